"""The frameworks that `make frameworks` runs: how each is installed, and the files and command of one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "siftune" / "demo" / "assets" / "model"
BATCH, LENGTH = 16, 256
LINES = 8
"""Packed lines of a micro-batch; each holds three or four chats."""
SECTION = {"method": "uds", "keep": "1/8"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a framework on the embedded model and two-turn chats."""

    folder: Path
    data: Path
    """`chat.jsonl`, one `messages` list a row."""
    steps: int = 20
    save_steps: int | None = None
    packed: bool = False
    resume: Path | None = None
    processes: int = 1
    hook: bool = False
    """By the framework's own hook instead of `siftune run`."""

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def write(self, name: str, values: Mapping[str, Any]) -> Path:
        """A YAML file in the run's folder."""
        path = self.folder / name
        path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
        return path


@dataclass(frozen=True, kw_only=True)
class Command:
    """The words of a run and what it needs in the environment."""

    words: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Framework:
    """How a framework is installed and started."""

    name: str
    title: str
    package: str
    python: tuple[str, ...]
    """Python versions that it runs on, the preferred one first."""
    command: Callable[[Run], Command]
    note: str
    """What the run on a CPU leaves out or changes."""
    processes_need: str | None = None
    """What two processes need besides a CPU; None where they run."""
    packing_needs: str | None = None
    """What its packing needs beyond a CPU."""
    empty_packages: tuple[str, ...] = ()
    """Packages that are imported and not used here; an empty stand-in is written for each."""


def _common(run: Run) -> dict[str, Any]:
    """Arguments that transformers' own trainers and these frameworks share."""
    return {
        "output_dir": str(run.output),
        "per_device_train_batch_size": LINES if run.packed else BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": run.steps,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps" if run.save_steps else "no",
        **({"save_steps": run.save_steps} if run.save_steps else {}),
        **({"resume_from_checkpoint": str(run.resume)} if run.resume else {}),
    }


def llamafactory(run: Run) -> Command:
    (run.data.parent / "dataset_info.json").write_text(
        json.dumps(
            {
                "chat": {
                    "file_name": run.data.name,
                    "formatting": "sharegpt",
                    "columns": {"messages": "messages"},
                    "tags": {
                        "role_tag": "role",
                        "content_tag": "content",
                        "user_tag": "user",
                        "assistant_tag": "assistant",
                    },
                }
            }
        )
    )
    values = {
        "model_name_or_path": str(MODEL),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "chat",
        "dataset_dir": str(run.data.parent),
        "template": "default",
        "cutoff_len": LENGTH,
        "report_to": "none",
        "use_cpu": True,
        "overwrite_output_dir": run.resume is None,
        **({"neat_packing": True} if run.packed else {}),
        **({"ddp_backend": "gloo"} if run.processes > 1 else {}),
        **_common(run),
    }
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(run.processes)} if run.processes > 1 else {}
    if run.hook:
        path = run.write("train.yaml", {**values, "siftune": SECTION})
        return Command(words=["python", "-m", "siftune.integrations.llamafactory", str(path)], env=env)
    return Command(words=["llamafactory-cli", "train", str(run.write("train.yaml", values))], env=env)


def axolotl(run: Run) -> Command:
    values = {
        "base_model": str(MODEL),
        "datasets": [{"path": str(run.data), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(run.folder / "prepared"),
        "sequence_len": LENGTH,
        "sample_packing": run.packed,
        "output_dir": str(run.output),
        "micro_batch_size": LINES if run.packed else BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": run.steps,
        "logging_steps": 1,
        "val_set_size": 0,
        "seed": 1,  # without one, Axolotl shuffles the rows anew at every start
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "use_tensorboard": False,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "save_strategy": "steps" if run.save_steps else "no",
        **({"save_steps": run.save_steps} if run.save_steps else {}),
        **({"resume_from_checkpoint": str(run.resume)} if run.resume else {}),
        **({"siftune": SECTION} if run.hook else {}),
    }
    path = run.write("config.yaml", values)
    if run.processes > 1:
        torchrun = ["torchrun", "--nproc_per_node", str(run.processes), "--standalone"]
        return Command(words=[*torchrun, "-m", "axolotl.cli.train", str(path)], env={"ACCELERATE_USE_CPU": "true"})
    return Command(words=["axolotl", "train", str(path), "--launcher", "python"], env={"ACCELERATE_USE_CPU": "true"})


def swift(run: Run) -> Command:
    values = {
        "model": str(MODEL),
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": "full",
        "dataset": str(run.data),
        "torch_dtype": "float32",
        "max_length": LENGTH,
        "split_dataset_ratio": 0,
        "add_version": False,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "attn_impl": "sdpa",
        "gradient_checkpointing": False,
        **({"packing": True} if run.packed else {}),
        **({"ddp_backend": "gloo"} if run.processes > 1 else {}),
        **_common(run),
    }
    words = ["swift", "sft"]
    for name, value in values.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    env = {"NPROC_PER_NODE": str(run.processes)} if run.processes > 1 else {}
    if run.hook:
        plugin = ROOT / "siftune" / "integrations" / "files" / "siftune_swift.py"
        words += ["--external_plugins", str(plugin), "--callbacks", "siftune"]
        env["SIFTUNE_CONFIG"] = str(run.write("sift.yaml", SECTION))
    return Command(words=words, env=env)


def oumi(run: Run) -> Command:
    chats = run.data.with_name("oumi.jsonl")
    chats.write_text(run.data.read_text())
    training = _common(run)
    if training.pop("save_strategy") == "no":
        training["save_steps"] = 0
    values = {
        "model": {
            "model_name": str(MODEL),
            "torch_dtype_str": "float32",
            "model_max_length": LENGTH,
            "device_map": "cpu",
            "attn_implementation": "sdpa",
        },
        "data": {
            "train": {
                "datasets": [{"dataset_name": "text_sft_jsonl", "dataset_path": str(chats)}],
                **({"pack": True} if run.packed else {}),
            }
        },
        "training": {
            **training,
            "trainer_type": "TRL_SFT",
            "enable_gradient_checkpointing": False,
            "mixed_precision_dtype": "NONE",
            "enable_wandb": False,
            "enable_tensorboard": False,
            "include_performance_metrics": False,
            "dataloader_num_workers": 0,
            "save_final_model": False,
            "optimizer": "adamw_torch",
        },
    }
    path = run.write("train.yaml", values)
    env = {"ACCELERATE_USE_CPU": "true"}
    if run.hook:
        plugin = ROOT / "siftune" / "integrations" / "files" / "siftune_oumi.py"
        deps = run.folder / "siftune-deps.txt"
        deps.write_text(f"{plugin}\n")
        env |= {"OUMI_EXTRA_DEPS_FILE": str(deps), "SIFTUNE_CONFIG": str(run.write("sift.yaml", SECTION))}
    words = ["oumi", "train", "-c", str(path)]
    if run.processes > 1:
        words = ["torchrun", "--nproc_per_node", str(run.processes), "--standalone", "-m", *words]
    return Command(words=words, env=env)


FRAMEWORKS = (
    Framework(
        name="llamafactory",
        title="LLaMA-Factory",
        package="llamafactory",
        python=("3.11", "3.12", "3.13"),
        command=llamafactory,
        note="without gradio and torchvision; torchaudio, imported for audio alone, is an empty stand-in",
        empty_packages=("torchaudio",),
    ),
    Framework(
        name="axolotl",
        title="Axolotl",
        package="axolotl",
        python=("3.12", "3.13"),
        command=axolotl,
        processes_need="CUDA: Axolotl asks it whether devices reach each other",
        note="its Triton kernels for LoRA are off, and packages for clouds, logging services and GPUs are left out",
    ),
    Framework(
        name="ms-swift",
        title="ms-swift",
        package="ms-swift",
        python=("3.11", "3.12", "3.13"),
        command=swift,
        note="complete",
        packing_needs="flash attention, hence a GPU",
    ),
    Framework(
        name="oumi",
        title="Oumi",
        package="oumi",
        python=("3.11", "3.12", "3.13"),
        command=oumi,
        note="with torch 2.13 instead of 2.12, the newest that its metadata allows; skypilot, lm_eval, torchao and torchvision are left out, mlflow is an empty stand-in",
        empty_packages=("mlflow",),
        processes_need="CUDA: Oumi sets a CUDA device in each of several processes",
        packing_needs="boundaries of rows, which Oumi's pack does not give; complete lines are chosen, with a warning",
    ),
)
