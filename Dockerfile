# megatron_qad on NVIDIA's PyTorch image, which brings torch 2.11, NCCL, Transformer Engine and apex built for each other.
# Only what it lacks is added: Mamba's kernels, compiled for its torch, and the project with its Python dependencies.
#   make image        # docker build --tag megatron_qad .
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3

# hadolint ignore=DL3006
FROM ${BASE} AS kernels
# They are looked for as built wheels unless told to compile, and those are of other torch builds.
ENV MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
WORKDIR /build
COPY pyproject.toml launch/image_requirements.py ./
RUN python image_requirements.py ssm > ssm.txt \
  && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels --requirement ssm.txt

# hadolint ignore=DL3006
FROM ${BASE}
WORKDIR /opt/megatron_qad
# Dependencies in a layer of their own: a change of the code does not fetch them again. torch stays NVIDIA's.
RUN --mount=type=bind,from=kernels,source=/build,target=/build \
  python /build/image_requirements.py --file /build/pyproject.toml > /tmp/requirements.txt \
  && pip install --no-cache-dir --requirement /tmp/requirements.txt \
  && pip install --no-cache-dir --no-deps /build/wheels/*.whl \
  && rm /tmp/requirements.txt
COPY pyproject.toml README.md pretrain_qad.py ./
COPY megatron_qad megatron_qad
COPY tools tools
COPY launch launch
COPY examples/paper_models examples/paper_models
# In place (not copied once more), without looking at dependencies, whose torch pin NVIDIA's version string does not meet.
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
  && python -c "import megatron.core, modelopt, mamba_ssm, causal_conv1d, transformer_engine; import megatron_qad" \
  && useradd --create-home --uid 10001 qad
USER 10001
ENTRYPOINT ["/opt/megatron_qad/launch/torchrun.sh"]
