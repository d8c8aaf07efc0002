#!/usr/bin/env bash
# transformers: the cache of a layer with a sliding window stores a whole prompt until the next token.
#
# After a prompt the layer shows window - 1 tokens, but as a view of the concatenated keys, whose
# memory has them all. Nothing frees it before the next call. So a cache that is kept as it is after a
# prompt, which is how prompts are shared between requests, has the size of the prompt and not of the
# window: in memory, in its deep copies, and in a file of torch.save. The first token after it, or a
# clone of the keys and values, brings it down.
#
# Seen with transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11, a window of 8, a prompt of 2000:
#   tokens shown 7, stored 2000, stored by a deep copy 2000, after one more token 8
#   a file of keys and values: 97 times as large as one of their clones
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q \
  torch==2.13.0 transformers==5.24.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import io

import torch
import transformers

config = transformers.MistralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, sliding_window=8,
    num_attention_heads=2, num_key_value_heads=1, eos_token_id=None,
)
torch.manual_seed(0)
model = transformers.MistralForCausalLM(config).eval()
cache = transformers.DynamicCache(config=config)


def stored(keys):
    return keys.untyped_storage().nbytes() // (keys.shape[-1] * keys.element_size())


def file_size(*tensors):
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.tell()


with torch.no_grad():
    model(torch.randint(64, (1, 2000)), cache=cache)
    layer = cache.layers[0]
    copied = copy.deepcopy(cache).layers[0]
    found = [layer.keys.shape[2], stored(layer.keys), stored(copied.keys)]
    ratio = file_size(layer.keys, layer.values) / file_size(layer.keys.clone(), layer.values.clone())
    model(torch.randint(64, (1, 1)), cache=cache)
    found.append(stored(cache.layers[0].keys))
print("tokens shown {}, stored {}, stored by a deep copy {}, after one more token {}".format(*found))
print(f"a file of keys and values: {ratio:.0f} times as large as one of their clones")
assert found == [7, 2000, 2000, 8], found
assert ratio > 50, ratio
PYTHON
