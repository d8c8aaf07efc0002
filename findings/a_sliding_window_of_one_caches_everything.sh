#!/usr/bin/env bash
# transformers: with sliding_window=1 the cache keeps every token, and generate writes other tokens
# with a cache than without one.
#
# The cache of a layer with a window keeps the last window - 1 tokens by a slice that starts at
# -window + 1. For a window of 1 that is 0, which is the first token and not the end. Without a cache
# the mask lets each token see itself alone. Windows of 2 and 3 do the same with and without a cache.
#
# Seen with transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11, a prompt of 6 and 8 new tokens:
#   window 1: other tokens than without a cache, 13 cached
#   window 2: the same tokens, 1 cached
#   window 3: the same tokens, 2 cached
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q \
  torch==2.13.0 transformers==5.24.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers

found = {}
for window in (1, 2, 3):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, eos_token_id=None,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=window,
    )
    model = transformers.MistralForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4.0)  # far from ties
    prompt = torch.randint(1, 64, (1, 6))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = transformers.DynamicCache(config=config)
    with_cache = model.generate(prompt, cache=cache, **options)
    same = torch.equal(with_cache, model.generate(prompt, use_cache=False, **options))
    found[window] = (same, cache.layers[0].keys.shape[2])
    words = "the same tokens" if same else "other tokens than without a cache"
    print(f"window {window}: {words}, {found[window][1]} cached")
assert found == {1: (False, 13), 2: (True, 1), 3: (True, 2)}, found
PYTHON
