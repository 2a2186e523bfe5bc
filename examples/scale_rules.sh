# Compares rules for the scales of NVFP4 weights; to be sourced by the examples' compare_scale_rules.sh with $here (folder of the
# example), $out (output directory) and $seeds set, $data (flags of the data) before quantize is called, and with a function policy RULE UPDATE, which prints a policy with
# these scales.
source examples/chains.sh
# ARMS="mse:frozen ..." in the environment selects some of them.
read -ra arms <<<"${ARMS:-max:every_step four_over_six:every_step four_over_six:frozen mse:frozen local_hessian:frozen}"
# The noise floor is measured in float32, where the perturbation of the inputs is the only noise.
sed '/^bf16:/d' "$here/train.yaml" >"$out/float32.yaml"

# quantize START TEACHER SEED FLAGS...: adds jobs to the chain "rules": QAD with the flags and each rule, and the noise floor of its
# result, which hardly depends on the seed and is measured once. With $ptq set, PTQ too.
quantize() {
  local start=$1 teacher=$2 seed=$3 arm name job_ranks=$ranks
  for arm in "${arms[@]}"; do
    name=$start-${arm/:/-}
    policy "${arm%:*}" "${arm#*:}" >"$out/$name.yaml"
    local flags=("${data[@]}" --qad-teacher "$teacher" --qad-policy "$out/$name.yaml")
    if [ "$seed" = "${seeds[0]}" ] && [ -n "${ptq:-}" ]; then
      job rules "$name-ptq" "quantizes the teacher" ptq --config "$here/train.yaml" "${flags[@]}" --save "$out/$name-ptq"
    fi
    job rules "$name-$seed" "distills" train --config "$here/train.yaml" "${flags[@]}" --save "$out/$name-$seed" --seed "$seed" "${@:4}"
    if [ "$seed" = "${seeds[0]}" ]; then
      job rules "$name-noise" "measures the noise floor" noise-floor --config "$out/float32.yaml" "${flags[@]}" \
        --qad-student "$out/$name-$seed" --output "$out/$name-noise.json"
    fi
  done
}
