"""Files hold data: a key that names code to run, or holds a secret, is refused wherever a file or `--set` says it."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from siftune.cli.main import main
from siftune.errors import UserError
from siftune.file_keys import check_file_keys
from siftune.sft.recipe import Recipe, presets, read_preset
from siftune.yaml_io import read_yaml

CODE = "names code to run, which no file may"


def refuses(content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_file_keys(content, "recipe.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model_kwargs", "trust_remote_code", True),
        ("model_kwargs", "trust-remote-code", "yes"),
        ("model_kwargs", "code_revision", "main"),
        ("model_kwargs", "auto_map", {"AutoModel": "evil.Evil"}),
        ("model_kwargs", "attn_implementation", "someone/kernel"),
        ("model_kwargs", "attn_implementation", {"text_config": "someone/kernel"}),
        ("model_kwargs", "experts_implementation", "someone/kernel"),
        ("model_kwargs", "use_kernels", True),
        ("model_kwargs", "kernel_config", {"RMSNorm": "someone/kernel:Norm"}),
        ("model_kwargs", "allow_all_kernels", True),
        ("model_kwargs", "tqdm_class", "evil.Bar"),
        ("model_kwargs", "weights_only", False),
        ("model_kwargs", "custom_generate", "someone/generate"),
        ("model_kwargs", "adapter_kwargs", {"trust_remote_code": True}),
        ("sft", "trust_remote_code", True),
        ("sft", "model_init_kwargs", {"trust_remote_code": True}),
        ("sft", "callbacks", ["evil.Callback"]),
        ("sft", "optimizer_cls_and_kwargs", ["evil.Optimizer", {}]),
        ("sft", "logits_processor", "evil.Processor"),
        ("sft", "data_collator", "evil.Collator"),
        ("sft", "compute_loss_func", "evil.loss"),
        ("sft", "formatting_func", "evil.form"),
        ("sft", "chat_template_path", "../evil"),
        ("sft", "gradient_checkpointing_kwargs", {"context_fn": "evil.context"}),
        ("sft", "gradient_checkpointing_kwargs", '{"context_fn": "evil.context"}'),
        ("sft", "torch_compile_backend", "evil.backend"),
        ("sft", "deepspeed", {"compile": {"backend": "evil.backend"}}),
        ("sft", "dataset_kwargs", {"tokenizer_class": "evil.Tokenizer"}),
        ("peft", "auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}),
        ("peft", "megatron_core", "evil"),
        ("peft", "megatron_config", {"hidden_size": 8}),
        ("quantization", "modules_class", "evil.Linear"),
        ("online", "score_fn", "evil.score"),
        ("online", "plugin", "evil"),
    ],
)
def test_a_key_that_names_code_is_refused_wherever_it_is(section: str, key: str, value: Any) -> None:
    sentence = refuses({section: {key: value}})
    assert sentence.startswith(f"recipe.yaml: {section}.{key}")
    assert CODE in sentence
    refuses({f"{section}.{key}": value})  # dotted, as --set and a configuration's `set:` say it
    refuses({"recipe": {section: {key: value}}})  # a study's
    refuses({"online": [{"method": "uds", key: value}]})  # an entry's


@pytest.mark.parametrize("stored", ["file", "text", "base64"])
@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config", "accelerator_config"])
def test_a_file_that_a_key_names_is_held_to_the_same_rules(tmp_path: Path, stored: str, key: str) -> None:
    text = json.dumps({"compile": {"backend": "evil.backend"}, "inner": {"trust_remote_code": True}})
    (tmp_path / "inner.json").write_text(text)
    coded = base64.urlsafe_b64encode(text.encode()).decode()
    value = {"file": str(tmp_path / "inner.json"), "text": text, "base64": coded}[stored]
    assert f"sft.{key}.compile.backend" in refuses({"sft": {key: value}})


PLAIN = {
    "model": "./model",
    "train": ["rows.jsonl"],
    "eval": {"token": "held.jsonl", "plugin": "b.jsonl"},
    "columns": {"instruction": "password"},
    "model_kwargs": {
        "attn_implementation": "sdpa",
        "dtype": "torch.bfloat16",
        "trust_remote_code": False,
        "weights_only": True,
        "token": True,
        "device_map": {"": 0},
    },
    "sft": {
        "learning_rate": 5e-5,
        "report_to": ["wandb"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "activation_checkpointing": True},
        "accelerator_config": {"split_batches": False, "dispatch_batches": None},
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
        "ddp_backend": "cpu:gloo,cuda:nccl",
        "torch_compile_backend": "inductor",
        "use_liger_kernel": True,
        "optim_target_modules": ["attn"],
    },
    "peft": {"r": 8, "target_modules": "all-linear", "modules_to_save": ["lm_head"], "exclude_modules": "a.b"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["x.y"]},
    "online": {"method": "uds", "keep": "1/8", "reference": "a/table.safetensors"},
}


def test_plain_data_is_let_through() -> None:
    check_file_keys(PLAIN, "recipe.yaml")


CALLABLE = re.compile(
    "call|class|cls|func|fn|hook|plugin|processor|import|remote|code|kernel|module|backend|mapping|megatron"
)
DATA = {
    "use_liger_kernel", "liger_kernel_config",  # switches of an installed package
    "optim_target_modules", "target_modules", "exclude_modules", "modules_to_save",  # names of the model's own modules
    "llm_int8_skip_modules",
    "torch_compile_backend", "ddp_backend",  # registered names; a path is refused, above
    "ddp_find_unused_parameters", "restore_callback_states_from_checkpoint",  # switches
}  # fmt: skip
"""Fields of the installed libraries that sound like code and are data."""


def test_every_field_of_the_installed_libraries_that_names_code_is_refused() -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    fields = {
        "sft": [(item.name, str(item.type)) for item in dataclasses.fields(SFTConfig)],
        "peft": [(item.name, str(item.type)) for item in dataclasses.fields(LoraConfig)],
        "quantization": [(name, "") for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"],
    }
    for section, named in fields.items():
        assert named
        for name, kind in named:
            if "Callable" in kind or (CALLABLE.search(name) and name not in DATA):
                assert CODE in refuses({section: {name: "evil.name"}}), name


def test_shipped_presets_are_plain() -> None:
    for name in presets():
        check_file_keys(read_preset(name), name)


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "variable"),
    [
        ({"sft": {"hub_token": "hf_x1"}}, "HF_TOKEN"),
        ({"model_kwargs": {"token": "hf_x1"}}, "HF_TOKEN"),
        ({"model_kwargs": {"use_auth_token": "hf_x1"}}, "HF_TOKEN"),
        ({"api_key": "hf_x1"}, "OPENAI_API_KEY"),
        ({"request": {"headers": {"Authorization": "Bearer hf_x1"}}}, "OPENAI_API_KEY"),
        ({"extra_body": [{"deep": {"password": "hf_x1"}}]}, "OPENAI_API_KEY"),
        ({"extra_body": {"secret": 12345678}}, "OPENAI_API_KEY"),
        ({"judge-url": "http://me:hf_x1@host/v1"}, "OPENAI_API_KEY"),
        ({"generator": "http://host/v1?api_key=hf_x1"}, "OPENAI_API_KEY"),
        ({"model_kwargs": {"proxies": {"https": "http://me:hf_x1@proxy"}}}, "HTTPS_PROXY"),
        ({"sft": {"deepspeed": {"comet": {"api_key": "hf_x1"}}}}, "COMET_API_KEY"),
        ({"model_kwargs": {"cache_dir": '{"wandb_token": "hf_x1"}'}}, "WANDB_API_KEY"),
        ({"pool": ["http://me:hf_x1@host/rows.jsonl"]}, "OPENAI_API_KEY"),
    ],
)
def test_a_secret_is_refused_by_naming_the_environments_variable(content: dict[str, Any], variable: str) -> None:
    sentence = refuses(content)
    assert variable in sentence
    assert "hf_x1" not in sentence
    assert "12345678" not in sentence
    assert "in the environment" in sentence


# --- every kind of file, from the command line ------------------------------------------------------------------------

TRUST = {"model_kwargs": {"trust_remote_code": True}}
TOKEN = {"sft": {"hub_token": "hf_x1"}}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "hf_x1" not in err
        return err

    return run


def written(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("content", [TRUST, TOKEN], ids=["code", "secret"])
def test_every_kind_of_file_is_refused(tmp_path: Path, refused: Any, content: dict[str, Any]) -> None:
    wanted = CODE if content is TRUST else "set HF_TOKEN in the environment"
    recipe = written(tmp_path / "recipe.yaml", {"model": "m", "train": "t.jsonl", **content})
    inner = {"model": "m", "pool": "p.jsonl", "held_out": "h.jsonl"}
    study = written(tmp_path / "study.yaml", {**inner, "recipe": content})
    named = written(tmp_path / "named.yaml", {**inner, "recipe": str(recipe)})
    key, section = next(iter(content)), next(iter(content.values()))
    entry = written(tmp_path / "entry.yaml", {**inner, "recipe": {}, "online": [{"method": "uds", **section}]})
    config = written(tmp_path / "config.yaml", content)
    task = written(tmp_path / "task.yaml", {"kind": "write", **content})
    suite = written(tmp_path / "suite.yaml", {"tasks": {"gsm8k": {"shots": 1, **section}}})
    mine = written(tmp_path / "mine.yaml", {"tasks": {"mine": {"task": task.name}}})
    for words in (
        ["train", recipe, "--dry-run"],
        ["score-reference", recipe, "--reference", "m"],
        ["compare", study, "--dry-run"],
        ["compare", named, "--dry-run"],
        ["compare", entry, "--dry-run"],
        ["loop", "daar", "pool.jsonl", "--model", "m", "--recipe", recipe, "--dry-run"],
        ["evaluate", "model", "--suite", suite],
        ["evaluate", "model", "--suite", mine],
        *([name, *rest, "--config", config] for name, rest in (("select", ["random"]), ("plan", []), ("train", []),
                                                               ("keep", []), ("evaluate", []), ("compare", []))),
        ["train", written(tmp_path / "good.yaml", {"model": "m", "train": "t"}), "--set", f"{key}={json.dumps(section)}"],
        ["train", tmp_path / "good.yaml", "--set", f"{key}.{next(iter(section))}={next(iter(section.values()))}"],
        ["train", tmp_path / "good.yaml", "--config",
         written(tmp_path / "set.yaml", {"set": {f"{key}.{next(iter(section))}": "hf_x1"}})],
        ["compare", written(tmp_path / "plain.yaml", {**inner, "recipe": {}}), "--set", f"recipe={json.dumps(content)}"],
    ):  # fmt: skip
        assert wanted in refused(*words), words


def test_a_command_is_named_on_the_command_line_alone(tmp_path: Path, refused: Any) -> None:
    config = written(tmp_path / "config.yaml", {"tune": "touch mark {train_file} {out_model}"})
    words = ["loop", "daar", "pool.jsonl", "--model", "m", "--config", config]
    assert "tune names a command to run, which no file may; pass --tune on the command line" in refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["select", "alpagasus", "p.jsonl", "--judge-url", "http://me:hf_x1@host/v1"],
        ["select", "alpagasus", "p.jsonl", "--judge-url", "http://host/v1?api_key=hf_x1"],
        ["select", "daar", "p.jsonl", "--model", "m", "--generator", "http://me:hf_x1@host/v1"],
        ["loop", "daar", "p.jsonl", "--model", "m", "--tune", "t.py --api-key hf_x1 {train_file} {out_model}"],
    ],
)
def test_an_option_with_a_secret_is_refused(words: list[str], refused: Any) -> None:
    assert " in the environment" in refused(*words)


def test_python_callers_pass_what_they_like() -> None:
    recipe = Recipe.read({"model": "m", "train": "t", **TRUST}, {"model_kwargs.code_revision": "main"})
    assert recipe.model_kwargs == {"trust_remote_code": True, "code_revision": "main"}


def test_a_recipe_never_holds_the_hubs_token() -> None:
    pytest.importorskip("trl")
    from siftune.sft.configs import sft_config

    with pytest.raises(UserError, match="set HF_TOKEN in the environment"):
        sft_config(Recipe.read({"model": "m", "train": "t", **TOKEN}), "out")


def test_names_that_the_author_chose_are_no_keys(tmp_path: Path) -> None:
    path = written(tmp_path / "domains.yaml", {"password": "Questions about passwords.", "callbacks": "Of JavaScript."})
    assert set(read_yaml(path, what="domains", names=True)) == {"password", "callbacks"}
