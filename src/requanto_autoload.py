"""Imports Requanto when Transformers, Diffusers or accelerate opens a checkpoint that it wrote, without ``import requanto``.

Python runs `install` at start-up, from ``requanto_autoload.pth``. It imports nothing: it adds a finder that waits for a few
modules of the two libraries and of accelerate. These are patched to look at each config that they read, and at the names in
files that are loaded without one. ``REQUANTO_AUTOLOAD=0`` turns it off.

Nothing changes for float models, and for users of optimum-quanto, until a checkpoint of Requanto is opened.
"""

import sys

_LOADERS = {}  # module of a library -> function that patches it, filled below


class _Finder:
    """Import finder for the modules in `_LOADERS`: loads them as usual, then patches them."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Returns the spec of one of the modules; None for any other."""
        if name not in _LOADERS or "requanto" in sys.modules:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is cls or find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _patch_after(spec.loader, _LOADERS[name])
                return spec
        return None


def _patch_after(loader, patch):
    run = loader.exec_module

    def exec_module(module):
        run(module)
        try:
            patch(module)
        except Exception as error:  # another version of the library: it works as if this file did not exist
            _log("warning", "%s was not patched to load checkpoints of Requanto: %s", module.__name__, error)

    loader.exec_module = exec_module


def install():
    """Adds the finder; a second call does nothing."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def _log(level, *message):
    import logging

    getattr(logging.getLogger("requanto"), level)(*message)


def _look_at(config):
    """Imports Requanto if a config, as read from a file, describes weights in its format."""
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    if isinstance(stored, dict) and stored.get("format") == "requanto":
        _import_requanto()


def _import_requanto():
    if "requanto" in sys.modules:
        return
    try:
        import requanto  # noqa: F401
    except Exception as error:  # the library then stops with its own error, which names what is needed
        _log("warning", "the checkpoint is in Requanto's format, but requanto cannot be imported: %r", error)
    else:
        _log("info", "requanto was imported: a checkpoint in its format is opened (REQUANTO_AUTOLOAD=0 prevents this)")


def _wrap(owner, name, look):
    """Replaces a method by one that calls ``look(result, *args)`` after it."""
    kind = type(owner.__dict__[name])  # classmethod or staticmethod
    original = owner.__dict__[name].__func__

    def method(*args, **kwargs):
        result = original(*args, **kwargs)
        look(result, *args)
        return result

    method.__name__, method.__qualname__, method.__doc__ = name, original.__qualname__, original.__doc__
    method.__module__, method.__wrapped__ = original.__module__, original
    setattr(owner, name, kind(method))


def _transformers_configs(module):
    _wrap(module.PreTrainedConfig, "get_config_dict", lambda result, *args: _read_by_transformers(result[0]))


def _read_by_transformers(config):
    if "requanto" in sys.modules:
        return
    _look_at(config)
    if "requanto" in sys.modules:
        # The call that read this config began before Requanto was there to keep it: a class of a part needs it.
        from requanto.integrations.transformers_parts import remember_config

        remember_config(config)


def _transformers_quantizers(module):
    # A config made by hand or from a config.json that the caller read. Called first, with its dict.
    _wrap(
        module.AutoHfQuantizer,
        "supports_quant_method",
        lambda result, stored: _look_at({"quantization_config": stored}),
    )


def _transformers_models(module):
    # A config that says nothing of the weights: the parts of these would be left unread, and the layers random.
    original = module.convert_and_load_state_dict_in_model

    def convert_and_load_state_dict_in_model(*args, **kwargs):
        if "requanto" not in sys.modules and _without_quantizer(*args, **kwargs):
            _import_requanto()
            if module.convert_and_load_state_dict_in_model is not convert_and_load_state_dict_in_model:
                return module.convert_and_load_state_dict_in_model(*args, **kwargs)
        return original(*args, **kwargs)

    convert_and_load_state_dict_in_model.__wrapped__ = original
    module.convert_and_load_state_dict_in_model = convert_and_load_state_dict_in_model


def _without_quantizer(model=None, state_dict=(), load_config=None, *args, **kwargs):
    return getattr(load_config, "hf_quantizer", None) is None and _has_codes(state_dict)


def _accelerate_files(module):
    import threading

    read, load = module.load_state_dict, module.load_checkpoint_in_model
    state = threading.local()

    def load_state_dict(*args, **kwargs):
        result = read(*args, **kwargs)
        if "requanto" not in sys.modules and _has_codes(result):
            _import_requanto()
            if module.load_state_dict is not load_state_dict:  # Requanto replaced it
                from requanto.integrations.accelerate_checkpoints import loading

                with loading(getattr(state, "model", None)):
                    return module.load_state_dict(*args, **kwargs)
        return result

    def load_checkpoint_in_model(model, *args, **kwargs):
        state.model = model
        try:
            return load(model, *args, **kwargs)
        finally:
            state.model = None

    load_state_dict.__wrapped__, load_checkpoint_in_model.__wrapped__ = read, load
    module.load_state_dict, module.load_checkpoint_in_model = load_state_dict, load_checkpoint_in_model


def _diffusers_configs(module):
    _wrap(module.ConfigMixin, "_dict_from_json_file", lambda result, *args: _look_at(result))


def _diffusers_single_files(module):
    mixin = module.FromOriginalModelMixin
    original = mixin.__dict__["from_single_file"].__func__

    def from_single_file(cls, pretrained_model_link_or_path_or_dict=None, **kwargs):
        if "requanto" not in sys.modules and _holds_codes(pretrained_model_link_or_path_or_dict):
            _import_requanto()
            if mixin.__dict__["from_single_file"].__func__ is not from_single_file:  # Requanto replaced it
                return cls.from_single_file(pretrained_model_link_or_path_or_dict, **kwargs)
        return original(cls, pretrained_model_link_or_path_or_dict, **kwargs)

    from_single_file.__doc__, from_single_file.__wrapped__ = original.__doc__, original
    mixin.from_single_file = classmethod(from_single_file)


def _holds_codes(source):
    """Whether a safetensors file (its header is read) or a state dict has a tensor ``..._qdata``."""
    if isinstance(source, dict):
        return _has_codes(source)
    if not str(source).endswith(".safetensors"):
        return False
    try:
        with open(source, "rb") as file:
            return b'_qdata"' in file.read(min(int.from_bytes(file.read(8), "little"), 2**27))
    except OSError:
        return False  # a file of the Hub, or none


def _has_codes(names):
    # torchao's weights have a part of this name too, after a dot.
    return any(str(name).endswith("_qdata") and not str(name).endswith("._weight_qdata") for name in names)


_LOADERS.update(
    {
        "transformers.configuration_utils": _transformers_configs,
        "transformers.quantizers.auto": _transformers_quantizers,
        "transformers.modeling_utils": _transformers_models,
        "accelerate.utils.modeling": _accelerate_files,
        "diffusers.configuration_utils": _diffusers_configs,
        "diffusers.loaders.single_file_model": _diffusers_single_files,
    }
)
