#!/usr/bin/env bash
# The main job from end to end: fetch a small model, quantize it to 4 bits, compare it with the original, let it speak.
set -euo pipefail
PY="${PY:-python3}"
OUT="${OUT:-build/demo}"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; }
fewbits() {
    say fewbits "$@"
    "$PY" -m fewbits "$@"
}

started=$SECONDS
mkdir -p "$OUT"
model=$(fewbits fetch smollm2-135m)
fewbits fetch calibration
text=wikitext2
if ! fewbits fetch wikitext2; then
    text=wiki
    echo "WikiText-2 cannot be fetched here: evaluating on the Wikipedia text that came with the calibration texts (wiki)." >&2
    echo "Figures on it differ from the published ones; with a copy: fewbits fetch wikitext2 --from FILE" >&2
fi
fewbits quantize "$model" "$OUT/smollm2-int4" --method gptq --bits 4 --group-size 64 --overwrite
fewbits inspect "$OUT/smollm2-int4"
fewbits eval "$OUT/smollm2-int4" --reference "$model" --text "$text" --windows 5
fewbits generate "$OUT/smollm2-int4" "Why is the sky blue?" --chat --max-tokens 60
echo "demo done in $((SECONDS - started)) s; the model is in $OUT/smollm2-int4" >&2
