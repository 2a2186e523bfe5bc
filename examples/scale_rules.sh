# Compares rules for the scales of NVFP4 weights; to be sourced by the examples' compare_scale_rules.sh with $here (folder of the
# example) and $out (output directory) set, and with two functions: job COMMAND FLAGS... runs a job with the example's settings, and
# policy RULE UPDATE prints a policy with these scales.
source examples/once.sh
# ARMS="mse:frozen ..." in the environment selects some of them.
read -ra arms <<<"${ARMS:-max:every_step four_over_six:every_step four_over_six:frozen mse:frozen local_hessian:frozen}"
# The noise floor is measured in float32, where the perturbation of the inputs is the only noise.
sed '/^bf16:/d' "$here/train.yaml" >"$out/float32.yaml"

# quantize START TEACHER SEED FLAGS...: QAD with the flags and each rule, and the noise floor of its result, which hardly depends on the
# seed and is measured once. With $ptq set, PTQ too.
quantize() {
  local start=$1 teacher=$2 seed=$3 arm name
  for arm in "${arms[@]}"; do
    name=$start-${arm/:/-}
    policy "${arm%:*}" "${arm#*:}" >"$out/$name.yaml"
    local flags=(--qad-teacher "$teacher" --qad-policy "$out/$name.yaml")
    [ -z "${ptq:-}" ] || once "$name-ptq" ptq --config "$here/train.yaml" "${flags[@]}" --save "$out/$name-ptq"
    once "$name-$seed" train --config "$here/train.yaml" "${flags[@]}" --save "$out/$name-$seed" --seed "$seed" "${@:4}"
    once "$name-noise" noise-floor --config "$out/float32.yaml" "${flags[@]}" --qad-student "$out/$name-$seed" \
      --output "$out/$name-noise.json"
  done
}
