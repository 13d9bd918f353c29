"""Which causal architectures of the installed transformers siftune works with: writes docs/architectures.md.

Every model type that `AutoModelForCausalLM` knows is built from a tiny random configuration, saved, and used three
times: `features` reads its first layer as `siftune select` does, `score` ranks a batch with uds and maxloss, and
`attach` sifts one step of a Trainer. A model is listed as working, as refused (with siftune's own sentence, at load or
at attach), as failing (which is a fault), or as not built here (transformers cannot make it so small).

    python scripts/architectures.py                 all of them, one process each, some seconds a model on a CPU
    python scripts/architectures.py llama mamba     these alone, printed and not written
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"
SECONDS = 60
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp", "block_ff_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_group", "topk_group"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "moe_k", "moe_topk"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window"), 128),
}
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "attention_layers",
    "attention_types",
)


# --- one model, in a process of its own -------------------------------------------------------------------------------


def tiny_config(model_type: str, vocabulary: int) -> Any:
    """A small configuration of a model type: known sizes are set where its own defaults have them."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    if "text_config" in getattr(cls, "sub_configs", {}) or model_type.endswith("_assistant"):
        raise ValueError("a multimodal configuration; its language model has a model type of its own")
    plain = cls()
    stored = plain.to_dict()
    values = {name: value for name, value in SMALL.items() if isinstance(stored.get(name), int)}
    layers = 2
    for name in PER_LAYER:
        if isinstance(stored.get(name), list) and stored[name]:
            kinds = list(dict.fromkeys(map(str, stored[name])))
            values[name] = ([*kinds, *kinds])[:layers] if isinstance(stored[name][0], str) else stored[name][:layers]
    return cls(**{**values, "vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1})


def check_one(model_type: str) -> dict[str, str]:
    """The verdict on one model type: `built`, and for each use `works`, or the sentence."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from siftune.errors import UserError
    from tests.tiny import VOCABULARY, tiny_tokenizer

    logging.set_verbosity_error()
    folder = Path(tempfile.mkdtemp())
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, VOCABULARY)).eval()
        if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
            raise ValueError("more than 30 million parameters with these sizes")
        model(input_ids=torch.tensor([[5, 9, 70, 33]]))
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    except BaseException as error:  # whatever transformers raises for such sizes
        return {"built": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    verdicts = {}
    for use, run in (("features", features), ("score", score), ("attach", attach)):
        try:
            run(folder, model)
            verdicts[use] = "works"
        except UserError as refused:
            verdicts[use] = f"refused: {refused}".replace(str(folder), "MODEL")
        except BaseException as error:
            verdicts[use] = f"FAILS: {type(error).__name__}: {error}".splitlines()[0][:200].replace(
                str(folder), "MODEL"
            )
    return verdicts


def features(folder: Path, model: Any) -> None:
    """The first layer's features of two texts."""
    import numpy as np

    from siftune.models.backbone import Backbone
    from siftune.models.features import extract

    made = extract(Backbone(str(folder), layer=1, device="cpu"), ["a first text", "another one"])
    assert np.isfinite(made.hidden).all()


def _batch() -> dict[str, Any]:
    import torch

    ids = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def score(folder: Path, model: Any) -> None:
    """Scores of one batch by uds and by maxloss."""
    import torch

    import siftune

    for method in (siftune.UDS(keep=2), siftune.MaxLoss(keep=2)):
        scores = method.score(model, _batch())
        assert torch.isfinite(scores.total).all(), scores.reasons


def attach(folder: Path, model: Any) -> None:
    """One sifted step of a Trainer."""
    import datasets
    from transformers import Trainer, TrainingArguments

    import siftune

    rows = [{name: value[index].tolist() for name, value in _batch().items()} for index in range(4)]
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=str(folder / "out"), save_strategy="no", **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows))
    siftune.attach(trainer, siftune.UDS(keep=2), quiet=True)
    trainer.train()


# --- all of them ------------------------------------------------------------------------------------------------------


def in_process(model_type: str) -> dict[str, str]:
    """`check_one` in a forked process, so that nothing of one model reaches the next, and imports are paid once."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        with os.fdopen(writer, "w") as result:
            json.dump(check_one(model_type), result)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        text = result.read()
    os.waitpid(child, 0)
    return dict(json.loads(text)) if text else {"built": f"the process ended without a result within {SECONDS} s"}


def preload() -> None:
    """Import in the parent what every model needs; no thread is started and no tensor computed."""
    import datasets  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: F401

    import siftune.hook.attach
    import siftune.models.features
    import siftune.online.maxloss
    import siftune.online.uds  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def page(verdicts: dict[str, dict[str, str]]) -> str:
    """The documentation page."""
    import transformers

    uses = ("features", "score", "attach")
    works = [name for name, found in verdicts.items() if all(found.get(use) == "works" for use in uses)]
    absent = {name: found["built"] for name, found in verdicts.items() if "built" in found}
    others = {name: found for name, found in verdicts.items() if name not in works and name not in absent}
    lines = [
        "# Architectures",
        "",
        f"Written by `python scripts/architectures.py` with transformers {transformers.__version__}: every model type that",
        "`AutoModelForCausalLM` knows, built from a tiny random configuration. `features` reads the first layer as",
        "`siftune select` does, `score` ranks a batch with uds and maxloss, `attach` sifts one step of a Trainer.",
        "",
        f"## Works ({len(works)})",
        "",
        ", ".join(f"`{name}`" for name in works) + ".",
        "",
        f"## Refused or in part ({len(others)})",
        "",
        "| model type | features | score | attach |",
        "|---|---|---|---|",
        *(f"| `{name}` | " + " | ".join(_cell(found[use]) for use in uses) + " |" for name, found in others.items()),
        "",
        f"## Not built here ({len(absent)})",
        "",
        "These need more than sizes to be built so small; nothing is known about them here.",
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| `{name}` | {_cell(why)} |" for name, why in absent.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    preload()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = arguments or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    verdicts = {}
    for name in names:
        verdicts[name] = in_process(name)
        sys.stdout.write(f"{name} {json.dumps(verdicts[name])}\n")
        sys.stdout.flush()
        if not arguments:
            PAGE.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
