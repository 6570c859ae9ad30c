"""save_pretrained of quantized models: options, other people's files, files of different saves, readers meanwhile."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_diffusers import TINY as DIFFUSERS
from tiny_diffusers import tiny_pipeline
from tiny_models import TINY, save_tiny, tiny_tokenizer

import requanto
from requanto import QuantoConfig
from requanto.checkpoint.format import CheckpointError, flatten
from requanto.report.convert import quantize_directory
from requanto.report.inspect import inspect_directory

LLAMA = TINY["llama"].auto
FOREIGN = (
    "adapter_model.safetensors",
    "optimizer.bin",
    "training_args.bin",
    "flux1-dev.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "tokenizer.json",
    "checkpoint-5/model.safetensors",
)


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("float"))


def _model(library: str, float_dir: Path, weights: str = "int8") -> Any:
    if library == "transformers":
        return LLAMA.from_pretrained(float_dir, quantization_config=QuantoConfig(weights=weights))
    made = DIFFUSERS["flux"].make()
    requanto.quantize(made, weights=weights)
    requanto.freeze(made)
    return made


def _load(library: str, path: Path, **options: Any) -> Any:
    return (LLAMA if library == "transformers" else DIFFUSERS["flux"].cls).from_pretrained(path, **options)


def _same(one: Any, two: Any) -> bool:
    states = [flatten(dict(model.state_dict())) for model in (one, two)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def _foreign(path: Path) -> dict[str, tuple[int, str]]:
    return {
        name: ((path / name).stat().st_ino, (path / name).read_text()) for name in FOREIGN if (path / name).exists()
    }


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_files_of_others_are_not_touched(library: str, float_dir: Path, tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"mine {name}")
    before = _foreign(tmp_path)
    model = _model(library, float_dir)
    for options in ({}, {"max_shard_size": "20KB"}, {"variant": "x"}, {"variant": "x", "max_shard_size": "20KB"}, {}):
        model.save_pretrained(tmp_path, **options)
        assert _foreign(tmp_path) == before
        assert _same(_load(library, tmp_path, variant=options.get("variant")), model)
    assert inspect_directory(tmp_path).quantized_bytes == inspect_directory(tmp_path).quantized_bytes > 0


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_variants_stay_beside_each_other(library: str, float_dir: Path, tmp_path: Path) -> None:
    model = _model(library, float_dir)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="x", max_shard_size="20KB")
    assert _same(_load(library, tmp_path), model)
    assert _same(_load(library, tmp_path, variant="x"), model)
    other = _model(library, float_dir, "int4")
    other.save_pretrained(tmp_path, variant="x")
    assert _same(_load(library, tmp_path, variant="x"), other)
    with pytest.raises(CheckpointError):  # the one config.json describes the last one
        _load(library, tmp_path)


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_save_says_which_variants_no_longer_load(
    library: str, float_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = "model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors"
    model = _model(library, float_dir)
    for variant in (None, "x", None):  # the same weights: one config describes both
        model.save_pretrained(tmp_path / "same", variant=variant)
    model.save_pretrained(tmp_path / "other", variant="x", max_shard_size="20KB")
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"somebody's")
    assert "will not load any more" not in caplog.text
    assert _same(_load(library, tmp_path / "same"), model)
    _model(library, float_dir, "int4").save_pretrained(tmp_path / "other")
    assert caplog.text.count("-00001-of-") == caplog.text.count("will not load any more") == 1
    assert "adapter_model" not in caplog.text
    with pytest.raises(CheckpointError):
        _load(library, tmp_path / "other", variant="x")
    save_file({"weight": torch.zeros(2)}, tmp_path / "same" / first)  # a float model
    model.save_pretrained(tmp_path / "same", variant="y")
    assert f"{tmp_path / 'same'}: {first} will not load any more" in caplog.text


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_process_that_is_not_the_main_one_writes_nothing(
    library: str, as_keyword: bool, float_dir: Path, tmp_path: Path
) -> None:
    model = _model(library, float_dir)
    for place in (tmp_path / "new", tmp_path / "old"):
        if place.name == "old":
            model.save_pretrained(place)
        before = {p.name: p.read_bytes() for p in place.iterdir()} if place.exists() else {}
        model.save_pretrained(place, **{"is_main_process": False}) if as_keyword else model.save_pretrained(
            place, False
        )
        assert {p.name: p.read_bytes() for p in place.iterdir()} == before


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_files_of_two_saves_do_not_load(library: str, float_dir: Path, tmp_path: Path) -> None:
    model = _model(library, float_dir)
    model.save_pretrained(tmp_path / "one", max_shard_size="40KB")
    with torch.no_grad():
        next(p for p in model.parameters() if not isinstance(p, requanto.QTensor)).add_(1)
    model.save_pretrained(tmp_path / "two", max_shard_size="40KB")
    shard = sorted((tmp_path / "one").glob("*.safetensors"))[0]
    shutil.copy(tmp_path / "two" / shard.name, shard)
    with pytest.raises(CheckpointError, match=f"different saves .*{shard.name}"):
        _load(library, tmp_path / "one")
    with pytest.raises(CheckpointError, match="different saves"):
        inspect_directory(tmp_path / "one")


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_checkpoints_without_an_id_load(library: str, float_dir: Path, tmp_path: Path) -> None:
    model = _model(library, float_dir)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    file = next(tmp_path.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "save_id": config["quantization_config"].pop("save_id")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _same(_load(library, tmp_path), model)


def test_a_config_saved_beside_weights_of_another_tool(float_dir: Path, tmp_path: Path) -> None:
    _model("transformers", float_dir).save_pretrained(tmp_path / "one")
    model = _load("transformers", tmp_path / "one")
    save_file(flatten(dict(model.state_dict())), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    assert "save_id" not in (tmp_path / "config.json").read_text()
    assert _same(_load("transformers", tmp_path), model)
    model.config.save_pretrained(tmp_path / "one")  # over the config of the save
    assert _same(_load("transformers", tmp_path / "one"), model)


def test_a_directory_of_optimum_quanto_is_replaced(float_dir: Path, tmp_path: Path) -> None:
    wrapped = requanto.QuantizedModelForCausalLM.quantize(LLAMA.from_pretrained(float_dir), weights="qint8")
    wrapped.save_pretrained(tmp_path)
    model = _model("transformers", float_dir, "int4")
    model.save_pretrained(tmp_path)
    assert _same(_load("transformers", tmp_path), model)
    wrapped.save_pretrained(tmp_path)
    assert requanto.QuantizedModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_what_is_uploaded_has_its_id(
    library: str, float_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    class Url:
        repo_id = "me/model"

    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> None:
        config = json.loads(Path(working_dir, "config.json").read_text())
        with safe_open(next(Path(working_dir).glob("*.safetensors")), "pt") as opened:
            seen.update(config=config["quantization_config"]["save_id"], file=opened.metadata()["save_id"])

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Url())
    monkeypatch.setattr(HfApi, "create_commit", lambda *args, **kwargs: Url())
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, folder_path, **__: upload(None, folder_path))
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: None)
    model = _model(library, float_dir)
    module = "transformers.modeling_utils.create_and_tag_model_card"
    if library == "diffusers":
        module = "diffusers.models.modeling_utils.load_or_create_model_card"
        monkeypatch.setattr("diffusers.models.modeling_utils.create_repo", lambda *args, **kwargs: Url())
        monkeypatch.setattr("diffusers.models.modeling_utils.populate_model_card", lambda card: card)
        monkeypatch.setattr(
            "diffusers.utils.hub_utils.upload_folder", lambda *_, folder_path, **__: upload(None, folder_path)
        )
    else:
        original = HfApi.create_commit

        def commit(self: Any, repo_id: str, operations: Any, **kwargs: Any) -> Any:
            upload(None, Path(next(o.path_or_fileobj for o in operations if o.path_in_repo == "config.json")).parent)
            return original()

        monkeypatch.setattr(HfApi, "create_commit", commit)

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("a card")

    monkeypatch.setattr(module, lambda *args, **kwargs: Card())
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["save_id"]
    assert seen == {"config": saved, "file": saved}
    assert len(saved) == 32
    assert "to-be" not in saved


def test_a_failed_pipeline_save_leaves_the_old_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "notes.txt").write_text("mine")
    before = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for part in (pipe.transformer, pipe.text_encoder):
        requanto.quantize(part, weights="int8")
        requanto.freeze(part)
    with monkeypatch.context() as patched:
        patched.setattr(type(pipe), "save_config", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="does not fit"):
            pipe.save_pretrained(tmp_path)
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "transformer" / "notes.txt").read_text() == "mine"
    loaded = type(pipe).from_pretrained(tmp_path, **dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2")))
    assert _same(loaded.transformer, pipe.transformer)
    assert _same(loaded.text_encoder, pipe.text_encoder)


def test_a_reader_meanwhile_gets_one_or_the_other_or_an_error(float_dir: Path, tmp_path: Path) -> None:
    models = [_model("transformers", float_dir, kind) for kind in ("int8", "int4")]
    models[0].save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    stop = threading.Event()

    def saver(number: int) -> None:
        while not stop.is_set():
            models[number].save_pretrained(tmp_path, max_shard_size="40KB" if number else "60KB")

    threads = [threading.Thread(target=saver, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    errors: list[Exception] = []
    loaded: list[Any] = []
    try:
        for _ in range(25):
            try:
                loaded.append(LLAMA.from_pretrained(tmp_path))
            except CheckpointError as error:
                errors.append(error)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all("oad again" in str(error) for error in errors), errors
    assert len(loaded) + len(errors) == 25
    assert all(any(_same(found, model) for model in models) for found in loaded)
    assert any(_same(LLAMA.from_pretrained(tmp_path), model) for model in models)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".requanto")]


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_while_weights_are_loaded_is_noticed(
    fails: bool, float_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from requanto.integrations.transformers import RequantoHfQuantizer

    old, new = (_model("transformers", float_dir, kind) for kind in ("int8", "int4"))
    old.save_pretrained(tmp_path)
    original = RequantoHfQuantizer._process_model_after_weight_loading

    def saved_meanwhile(self: Any, model: Any, **kwargs: Any) -> Any:
        new.save_pretrained(tmp_path)
        if fails:
            raise KeyError("a tensor that the new files lack")
        return original(self, model, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RequantoHfQuantizer, "_process_model_after_weight_loading", saved_meanwhile)
        with pytest.raises(CheckpointError, match=r"config.json, model.safetensors .* changed while .* Load again"):
            LLAMA.from_pretrained(tmp_path)
    assert _same(LLAMA.from_pretrained(tmp_path), new)


def test_quantizing_another_model_into_a_directory(float_dir: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(float_dir, source)
    tiny_tokenizer().save_pretrained(source)
    (source / "chat_template.jinja").write_text("of the first")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    quantize_directory(source, out, QuantoConfig(weights="int8"))
    assert (out / "chat_template.jinja").read_text() == "of the first"
    (source / "chat_template.jinja").unlink()
    (out / "tokenizer.json").write_text("")
    quantize_directory(source, out, QuantoConfig(weights="int4"))
    assert not (out / "chat_template.jinja").exists()
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "notes.txt").read_text() == "mine"
