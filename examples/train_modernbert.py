"""Train a small ModernBERT from scratch on Python's own documentation, with transformers' Trainer.

    pip install 'atat_fast[transformers]'
    python train_modernbert.py [--steps 200] [--out modernbert]

One line is this package's: accelerate(model). The head, the largest part of a small model, then runs on the hidden 30 % of the
tokens alone, and their logits are never all in memory. The rest is as for any model of transformers.
"""

import argparse

import torch
import transformers

import atat_fast
from atat_fast.config import DataConfig
from atat_fast.data import prepare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--out", default="modernbert")
args = parser.parse_args()

# Text as token ids, with a tokenizer trained on it that AutoTokenizer reads.
data = prepare(DataConfig(corpus="python-docs", tokenizer="bpe-8192"))
data.tokenizer.save(args.out, longest=args.length)
tokenizer = transformers.AutoTokenizer.from_pretrained(args.out)


class Windows(torch.utils.data.Dataset):
    """Every window of `length` tokens."""

    def __len__(self):
        return data.train.num_sequences(args.length)

    def __getitem__(self, i):
        return {"input_ids": torch.from_numpy(data.train.sequence(i, args.length).astype("int64"))}


transformers.set_seed(1)
ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "cls_token_id": None, "sep_token_id": None}
config = transformers.ModernBertConfig(
    vocab_size=data.tokenizer.model_vocab_size,
    hidden_size=args.width,
    intermediate_size=args.width * 3 // 2,
    num_hidden_layers=6,
    num_attention_heads=args.width // 64,
    max_position_embeddings=args.length,
    eos_token_id=data.tokenizer.eos_id,
    **ids,
)
model = transformers.ModernBertForMaskedLM(config)
atat_fast.accelerate(model)  # the one line

trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=1e-3,
        warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Windows(),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
)
trainer.train()
model.save_pretrained(args.out)  # as any model: ModernBertForMaskedLM.from_pretrained reads it
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; written to {args.out}")
