"""Fine-tune a bidirectional decoder on prompts and responses, with the objective of LLaDA.

    pip install 'atat_fast[transformers]'
    python finetune_llada.py [--steps 300]                          a small model and a toy task: words backwards
    python finetune_llada.py --model GSAI-ML/LLaDA-8B-Base --mask_id 126336 --rows rows.jsonl

Rows are JSON lines with prompt and response. Prompts and padding are never hidden nor counted. Each step hides exactly k tokens
of each response, k spread evenly over the batch, and the loss is the likelihood bound of the responses, in nats a token.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import transformers

import atat_fast
from atat_fast.models.accelerate import masked_diffusion_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="", help="a folder or hub id; its code is run (trust_remote_code)")
parser.add_argument("--mask_id", type=int, default=1)
parser.add_argument("--rows", type=Path)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--lr", type=float, default=1e-3)
args = parser.parse_args()
random.seed(1), transformers.set_seed(1)
PAD, END, BYTES = 0, 2, 3  # of the toy model, whose other ids are 3 + byte

if args.model:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = transformers.AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=torch.bfloat16)
    encode, end = (lambda text: tokenizer(text, add_special_tokens=False).input_ids), tokenizer.eos_token_id
else:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    special = {"pad_token_id": PAD, "mask_token_id": args.mask_id, "bos_token_id": None, "eos_token_id": END}
    model = transformers.EuroBertForMaskedLM(transformers.EuroBertConfig(vocab_size=BYTES + 256, **sizes, **special))
    encode, end = (lambda text: [BYTES + byte for byte in text.encode()]), END

if args.rows:
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
else:
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 8))) for _ in range(5000)]
    rows = [{"prompt": f"{word} backwards is ", "response": word[::-1]} for word in words]

device = "cuda" if torch.cuda.is_available() else "cpu"
atat_fast.accelerate(model.to(device).train())
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
losses = []
for step in range(args.steps):
    chosen = [(encode(row["prompt"]), [*encode(row["response"]), end]) for row in random.sample(rows, args.batch)]
    length = max(len(prompt) + len(response) for prompt, response in chosen)
    tokens = torch.full((args.batch, length), end)
    frozen, attention_mask = torch.zeros(args.batch, length, dtype=torch.bool), torch.zeros(args.batch, length, dtype=torch.long)
    for i, (prompt, response) in enumerate(chosen):
        tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        frozen[i, : len(prompt)] = attention_mask[i, : len(prompt) + len(response)] = True
    batch = {"frozen": frozen.to(device), "attention_mask": attention_mask.to(device)}
    loss = masked_diffusion_loss(model, tokens.to(device), mask_id=args.mask_id, seed=1, step=step, **batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
    if (step + 1) % max(1, args.steps // 10) == 0:
        print(f"step {step + 1}: {sum(losses[-20:]) / len(losses[-20:]):.3f} nats a token of the responses", flush=True)
tenth = max(1, len(losses) // 10)
print(f"loss {sum(losses[:tenth]) / tenth:.3f} at first, {sum(losses[-tenth:]) / tenth:.3f} at last")
