"""Loads checkpoints in a process without `import requanto`, as a tool that is given a path; test_without_import.py runs it.

    python without_import.py SITE LIBRARY WHAT ...

SITE: folder whose .pth files are processed first, as Python does for its site-packages; "-": none.
LIBRARY: "as-it-is", or "no-quanto" to hide optimum-quanto.
WHAT: steps, `kind=path`. For each a line of JSON: the class of one weight and the sum of the answer, or the error.
"""

import json
import logging
import site
import sys


def transformers_model(path):
    """A text model of Transformers, by its auto class."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        answer = model(torch.arange(3, 11)[None]).logits
    return type(model.model.layers[0].self_attn.q_proj.weight).__name__, answer


def own_class(path):
    """The same by the model's own class, which reads the config itself."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        answer = model(torch.arange(3, 11)[None]).logits
    return type(model.model.layers[0].self_attn.q_proj.weight).__name__, answer


float_model = own_class


def config_by_hand(path):
    """The config object was made before, from a dict."""
    import torch
    import transformers

    with open(f"{path}/config.json") as file:
        config = transformers.LlamaConfig.from_dict(json.load(file))
    model = transformers.LlamaForCausalLM.from_pretrained(path, config=config).eval()
    with torch.no_grad():
        answer = model(torch.arange(3, 11)[None]).logits
    return type(model.model.layers[0].self_attn.q_proj.weight).__name__, answer


def text_tower(path):
    """CLIP's text model, out of a checkpoint of the whole CLIP."""
    import torch
    import transformers

    model = transformers.CLIPTextModel.from_pretrained(path).eval()
    with torch.no_grad():
        answer = model(torch.arange(3, 11)[None]).last_hidden_state
    (weight,) = [p for name, p in model.named_parameters() if name.endswith("layers.0.mlp.fc1.weight")]
    return type(weight).__name__, answer


def plain_config(path):
    """The caller's own config, which says nothing of how the weights are stored."""
    import torch
    import transformers

    with open(f"{path}/config.json") as file:
        fields = json.load(file)
    del fields["quantization_config"]
    model = transformers.LlamaForCausalLM.from_pretrained(path, config=transformers.LlamaConfig.from_dict(fields))
    return type(model.model.layers[0].self_attn.q_proj.weight).__name__, torch.ones(1)


def files_of_accelerate(path):
    """accelerate's loader, which reads no config."""
    import accelerate
    import torch
    import transformers

    with open(f"{path}/config.json") as file:
        fields = json.load(file)
    del fields["quantization_config"]
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(fields))
    accelerate.load_checkpoint_and_dispatch(model, f"{path}/model.safetensors", device_map={"": "cpu"})
    return type(model.model.layers[0].self_attn.q_proj.weight).__name__, torch.ones(1)


def pipeline(path):
    """A saved pipeline of Diffusers."""
    import diffusers
    import torch

    absent = dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2", "feature_extractor", "image_encoder"))
    pipe = diffusers.FluxPipeline.from_pretrained(path, **absent, torch_dtype=torch.float32)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    return type(weight).__name__, weight @ torch.ones(weight.shape[1])


def diffusers_model(path):
    """One model of Diffusers."""
    import diffusers
    import torch

    weight = diffusers.FluxTransformer2DModel.from_pretrained(path).transformer_blocks[0].attn.to_q.weight
    return type(weight).__name__, weight @ torch.ones(weight.shape[1])


def single_file(path):
    """The file of such a model, by `from_single_file`."""
    import diffusers
    import torch

    model = diffusers.FluxTransformer2DModel.from_single_file(
        f"{path}/diffusion_pytorch_model.safetensors", config=path, torch_dtype=torch.float32
    )
    weight = model.transformer_blocks[0].attn.to_q.weight
    return type(weight).__name__, weight @ torch.ones(weight.shape[1])


def of_optimum_quanto(path):
    """optimum-quanto's own loader."""
    import torch
    from optimum.quanto import QuantizedModelForCausalLM

    return type(QuantizedModelForCausalLM.from_pretrained(path)).__name__, torch.ones(1)


def requantized(path):
    """Transformers' own QuantoConfig, on a float model: optimum-quanto's business as long as nobody asked for Requanto."""
    import torch
    import transformers

    config = transformers.QuantoConfig(weights="int8")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    return type(model.hf_quantizer).__name__, torch.ones(1)


def _run(step):
    kind, _, path = step.partition("=")
    try:
        name, answer = globals()[kind](path)
        found = {"class": name, "sum": float(answer.double().abs().sum())}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return found | {"step": kind, "imported": "requanto" in sys.modules}


if __name__ == "__main__":
    folder, library, *steps = sys.argv[1:]
    logging.disable(logging.WARNING)
    if folder != "-":
        site.addsitedir(folder)
    if library == "no-quanto":
        sys.modules["optimum.quanto"] = None
        import importlib.util

        find = importlib.util.find_spec  # by which the libraries look for it
        importlib.util.find_spec = lambda name, *args: None if "optimum" in name else find(name, *args)
        import importlib.metadata

        version = importlib.metadata.version

        def without(name):
            if "optimum" in name:
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        importlib.metadata.version = without
    for step in steps:
        print(json.dumps(_run(step)), flush=True)
