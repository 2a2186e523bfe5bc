# megatron_qad on NVIDIA's PyTorch image, which has torch 2.11, NCCL, Transformer Engine and apex built for each other.
# Added are only Mamba's kernels, compiled for this torch, and the project with its Python dependencies.
#   make image        # docker build --tag megatron_qad .
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3

# hadolint ignore=DL3006
FROM ${BASE} AS kernels
# Compiles the kernels: prebuilt wheels, which are the default, are for other builds of torch.
ENV MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
WORKDIR /build
COPY pyproject.toml launch/image_requirements.py ./
RUN python image_requirements.py ssm > ssm.txt \
  && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels --requirement ssm.txt

# hadolint ignore=DL3006
FROM ${BASE}
WORKDIR /opt/megatron_qad
# Dependencies have their own layer, so that a code change does not download them again. NVIDIA's torch is kept.
RUN --mount=type=bind,from=kernels,source=/build,target=/build \
  python /build/image_requirements.py --file /build/pyproject.toml > /tmp/requirements.txt \
  && pip install --no-cache-dir --requirement /tmp/requirements.txt \
  && pip install --no-cache-dir --no-deps /build/wheels/*.whl \
  && rm /tmp/requirements.txt
COPY pyproject.toml setup.py README.md LICENSE pretrain_qad.py ./
COPY megatron_qad megatron_qad
COPY tools tools
COPY launch launch
COPY examples/recipes examples/recipes
# Editable, without a second copy. --no-deps, because NVIDIA's version string of torch does not satisfy the pin.
RUN pip install --no-cache-dir "setuptools>=77,<82" \
  && pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
  && python -c "import megatron.core, modelopt, mamba_ssm, causal_conv1d, transformer_engine; import megatron_qad" \
  && useradd --create-home --uid 10001 qad
USER 10001
ENTRYPOINT ["/opt/megatron_qad/launch/torchrun.sh"]
