"""QLoRA with peft and bitsandbytes, in their own environment; prints one JSON line.

    python benchmarks/peers/qlora_peer.py REQUEST.json

REQUEST holds model, ids (a safetensors file of rows), steps, batch, r, alpha, lr, warmup, max_grad_norm, seed,
checkpointing, dense (LoRA on the unquantized model), save_steps. A line for each step goes to ``log.jsonl`` in its out;
a run that was stopped goes on from its last checkpoint. The recipe is peft's documentation: load in 4 bits,
``prepare_model_for_kbit_training``, LoRA on all linear layers, transformers' Trainer.
"""

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peer_job import peak_rss_bytes, read_ids, report
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments


class Watch(TrainerCallback):
    """A line of ``log`` for each step."""

    def __init__(self, log: Path):
        self.log = log

    def on_step_begin(self, args, state, control, **rest):
        self.began, self.spent = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **rest):
        self.seconds, self.cpu = time.perf_counter() - self.began, time.process_time() - self.spent

    def on_log(self, args, state, control, logs=None, **rest):
        if "loss" in logs:
            line = {"step": state.global_step, "loss": logs["loss"], "seconds": self.seconds, "cpu_seconds": self.cpu}
            with self.log.open("a") as f:
                f.write(json.dumps(line | {"peak_rss_bytes": peak_rss_bytes()}) + "\n")


def newest(out: Path) -> Path | None:
    """The last checkpoint that is whole: the state is written last."""
    found = [p for p in out.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def cut(log: Path, step: int) -> None:
    """Drop the lines after ``step``, which are made again."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))


def main() -> None:
    ask = json.loads(Path(sys.argv[1]).read_text())
    out = Path(ask["out"])
    out.mkdir(parents=True, exist_ok=True)
    last = newest(out)
    cut(out / "log.jsonl", 0 if last is None else int(last.name.split("-")[1]))
    rows = read_ids(Path(ask["ids"]))
    data = [{"input_ids": row, "labels": row} for row in rows]
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        ask["model"], dtype=torch.float32, quantization_config=None if ask["dense"] else four
    )
    kind = {"use_reentrant": False}
    if not ask["dense"]:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=ask["checkpointing"], gradient_checkpointing_kwargs=kind
        )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=ask["r"], lora_alpha=ask["alpha"], lora_dropout=0.0, target_modules="all-linear"
    )
    torch.manual_seed(ask["seed"])
    model = get_peft_model(model, config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=ask["out"],
            max_steps=ask["steps"],
            per_device_train_batch_size=ask["batch"],
            learning_rate=ask["lr"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=math.ceil(ask["warmup"] * ask["steps"]),
            max_grad_norm=ask["max_grad_norm"],
            optim="adamw_torch",
            gradient_checkpointing=ask["checkpointing"],
            gradient_checkpointing_kwargs=kind if ask["checkpointing"] else None,
            logging_steps=1,
            save_strategy="steps",
            save_steps=ask["save_steps"],
            save_total_limit=2,
            seed=ask["seed"],
            data_seed=ask["seed"],
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        callbacks=[Watch(out / "log.jsonl")],
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.save_pretrained(ask["out"])
    report(tool=f"peft {version('peft')}, bitsandbytes {version('bitsandbytes')}", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
