"""What is inspected: one or more models, a batch, and the step that trains them, brought into one form.

Nothing here knows what the batch holds or what the loss means. The models are used as they are and put back as they
were, because a step of the user's, its optimizers and its closures are bound to them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ampscope.errors import InspectError
from ampscope.precisions import Precision
from ampscope.tensors import tensors_in

MODEL_WORDS = ("m", "model", "models", "net", "nets", "network", "networks", "module", "modules", "step")
MISFITS = (TypeError, AttributeError, ValueError, IndexError, KeyError)  # of a function that is called as another form


def core(wrapped: nn.Module) -> nn.Module:
    """Return the user's own network inside DistributedDataParallel, DataParallel or torch.compile's wrapper."""
    model: Any = wrapped
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def takes_hooks(module: nn.Module) -> bool:
    """Return True if a module takes hooks; torch.jit refuses them for its own."""
    return not isinstance(module, torch.jit.ScriptModule)


def parameters_of(function: Callable) -> list[inspect.Parameter] | None:
    """Return the parameters of a function; None if it has no signature to be read."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def looks_like_a_step(function: Callable) -> bool:
    """Return True if a function looks like a step(model, batch) and not a loss(outputs, batch), by the names in it."""
    parameters = parameters_of(function) or []
    if parameters and parameters[0].name in MODEL_WORDS:
        return True
    name = getattr(function, "__name__", "")
    return "step" in name and "loss" not in name


def is_criterion(function: Any) -> bool:
    """Return True if a loss takes (outputs, targets), as PyTorch's own losses do, and not (outputs, batch)."""
    return isinstance(function, nn.Module) or getattr(function, "__module__", "") == "torch.nn.functional"


class Subject:
    """Hold models by name, their batch, optimizers by name and the step.

    One model has the name "". `step` is called with (models, batch) and, by their names, with what else it asks for:
    `optimizer`, `optimizers`, `scaler`. Without a step the loss is `loss(outputs, batch)`, or what the model itself
    calls its loss. `goes_on` is True if the program does more after what is traced as its step.
    """

    goes_on = False

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        batch: Any,
        loss: Callable | None = None,
        *,
        step: Callable | None = None,
        optimizers: Any = None,
        scaler: Any = None,
    ):
        self.single = not isinstance(model, Mapping)
        self.given = model
        self.models: dict[str, nn.Module] = dict(model) if isinstance(model, Mapping) else {"": model}
        wrong = [value for value in self.models.values() if not isinstance(value, nn.Module)]
        if wrong or not self.models:
            raise InspectError(
                f"inspect needs a torch.nn.Module, or a dictionary of them by name, not {_kind_of(wrong or model)}."
            )
        self._guessed = step is None and loss is not None and not is_criterion(loss)
        if self._guessed and loss is not None and looks_like_a_step(loss):
            step, loss = loss, None
        for function in (step, loss):
            if function is not None and not callable(function):
                raise InspectError(f"the loss or step must be a function, not {_kind_of(function)}.")
        if step is None and not self.single:
            raise InspectError("several models need a step: a function step(models, batch) that returns the loss.")
        self.batch = batch
        self.loss = loss
        self.step = step
        self.optimizers = _named_optimizers(optimizers)
        self.scaler = scaler
        self.rewind: Callable[[], None] = lambda: None  # within `kept`: puts everything back as it was
        self.misfit = ""  # says as what a function was called that fails in both forms
        self._call: Callable | None = None
        self._own: torch.optim.Optimizer | None = None
        self._scalers: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or, without any, of the first tensor in the batch."""
        owners = [tensor for model in self.models.values() for tensor in (*model.parameters(), *model.buffers())]
        first = [*owners, *tensors_in(self.batch)]
        return first[0].device if first else torch.device("cpu")

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module with the name of its model before its own, without wrappers and scripted modules."""
        for prefix, model in self.models.items():
            for name, module in core(model).named_modules():
                if takes_hooks(module):
                    yield ".".join(part for part in (prefix, name) if part), module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, model in self.models.items():
            for name, parameter in core(model).named_parameters():
                yield ".".join(part for part in (prefix, name) if part), parameter

    def parameters(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameter for _, parameter in self.named_parameters()))

    def owners(self) -> dict[str, nn.Module]:
        """Return the modules that hold all trained parameters, by the prefix of their names."""
        return self.models

    def stepped_on(self) -> list[nn.Parameter]:
        """Return the parameters that optimizers may step on."""
        return self.parameters()

    def run(self) -> Any:
        """Call the step, or the model and the loss; return what the user's function returned.

        A function of unknown form that fails in its first call is tried as the other form, too.
        """
        if not self._guessed:
            return self._run(self.step, self.loss)
        self._guessed = False
        try:
            return self._run(self.step, self.loss)
        except MISFITS as error:
            if not self.single:
                raise
            forms = self.step, self.loss
            self.loss, self.step = forms
            try:
                return self._run(self.step, self.loss)
            except Exception:
                self.step, self.loss = forms
                self.misfit = self._taken_for()
                raise error from None

    def _run(self, step: Callable | None, loss: Callable | None) -> Any:
        if step is not None:
            return step(*self._arguments(step))
        outputs = self.call_model(self.models[""])
        return outputs if loss is None else loss(outputs, self._targets() if is_criterion(loss) else self.batch)

    def _targets(self) -> Any:
        """Return the part of the batch that a loss of PyTorch's compares the outputs with."""
        if isinstance(self.batch, Mapping):
            names = [name for name in self.batch if str(name).startswith(("label", "target"))]
            return self.batch[names[0]] if names else self.batch
        pair = isinstance(self.batch, Sequence) and len(self.batch) > 1
        return self.batch[-1] if pair else self.batch

    def _taken_for(self) -> str:
        """Say as what the user's function was called."""
        function = self.step or self.loss
        name = getattr(function, "__name__", type(function).__name__)
        form = "step(model, batch)" if self.step is not None else "loss(outputs, batch)"
        return f" {name} was taken for a {form}; as the other form it fails, too."

    def materialise(self) -> None:
        """Run lazy modules once, because they have no weights before; raise InspectError if they stay without."""
        if not any(nn.parameter.is_lazy(parameter) for _, parameter in self.named_parameters()):
            return
        failure: Exception | None = None
        try:
            if self.step is None:
                with torch.no_grad():
                    self.call_model(self.models[""])
            else:
                self.run()
        except Exception as error:
            failure = error
        lazy = [name for name, parameter in self.named_parameters() if nn.parameter.is_lazy(parameter)]
        if lazy:
            reason = f" ({type(failure).__name__}: {failure})" if failure else ""
            raise InspectError(
                f"{lazy[0]} has no shape yet: call the model once with a batch before it is inspected{reason}."
            )

    def _arguments(self, step: Callable) -> list[Any]:
        known = {
            "optimizers": self.optimizers if len(self.optimizers) != 1 else next(iter(self.optimizers.values())),
            "optimizer": next(iter(self.optimizers.values()), None),
            "scaler": self.scaler,
        }
        arguments = [self.given, self.batch]
        for parameter in (parameters_of(step) or [])[2:]:
            if parameter.name in known:
                arguments.append(known[parameter.name])
            elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                raise InspectError(
                    f"step has a parameter {parameter.name!r}; it may take model, batch, and then optimizer, "
                    "optimizers or scaler."
                )
            else:
                break
        return arguments

    def call_model(self, model: nn.Module) -> Any:
        """Call model(batch), model(*batch) or model(**batch): the first that its signature admits and that works.

        A sequence is cut to what `forward` requires (its inputs; the rest is for the loss), a dictionary to the names
        that it knows.
        """
        if self._call is not None:
            return self._call(model)
        ways = _ways_to_call(core(model), self.batch)
        failure: Exception | None = None
        for way in ways:
            try:
                outputs = way(model)
            except (TypeError, AssertionError, ValueError, AttributeError, IndexError, KeyError) as error:
                failure = failure or error
            else:
                self._call = way
                return outputs
        assert failure is not None  # there is always one way at least
        raise failure

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Put weights, buffers, gradients, optimizers, scaler and random numbers back as they were."""
        tensors = [tensor for model in self.models.values() for tensor in (*model.parameters(), *model.buffers())]
        values = [(tensor, tensor.detach().clone()) for tensor in tensors]
        gradients = [(parameter, parameter.grad) for parameter in self.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        states = [(thing, copy.deepcopy(thing.state_dict())) for thing in self._stateful()]
        devices = [self.device] if self.device.type == "cuda" else []

        def rewind() -> None:
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for parameter, _ in gradients:
                parameter.grad = None
            for thing, state in states:
                restore(thing, state)

        self.rewind = rewind
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            rewind()
            self.rewind = lambda: None
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def update_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers handed over, or one made here: Adam, or SGD if gradients are sparse."""
        if not self.optimizers and self._own is None:
            some = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if not some:
                return []
            sparse = any(getattr(module, "sparse", False) for _, module in self.named_modules())
            fused = self.device.type in ("cpu", "cuda") and all(part.is_floating_point() for part in some)
            self._own = torch.optim.SGD(some, lr=1e-4) if sparse else torch.optim.Adam(some, lr=1e-4, fused=fused)
        return list(self.optimizers.values()) or ([self._own] if self._own is not None else [])

    def update_scaler(self, precision: Precision | None) -> Any:
        """Return the scaler handed over, or the one that the precision needs."""
        if self.scaler is not None:
            return self.scaler
        name = precision.name if precision else "fp32"
        if name not in self._scalers:
            self._scalers[name] = (precision or Precision("fp32", self.device)).grad_scaler()
        return self._scalers[name]

    def forget(self) -> None:
        """Drop the optimizer and the scalers that were made here."""
        self._own = None
        self._scalers.clear()

    def _stateful(self) -> list[Any]:
        scaler = [self.scaler] if self.scaler is not None else []
        return [*self.optimizers.values(), *scaler]


def restore(thing: Any, state: dict[str, Any]) -> None:
    """Load the state of an optimizer or a scaler; forget what it had gathered since."""
    if isinstance(thing, torch.optim.Optimizer):
        thing.state.clear()
    if state:  # a disabled scaler has none
        thing.load_state_dict(state)


def _kind_of(value: Any) -> str:
    value = value[0] if isinstance(value, list) and value else value
    return f"a value of type {type(value).__name__}"


def _named_optimizers(optimizers: Any) -> dict[str, torch.optim.Optimizer]:
    if optimizers is None:
        return {}
    if isinstance(optimizers, Mapping):
        named = dict(optimizers)
    else:
        some = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        named = {str(index) if len(some) > 1 else "": optimizer for index, optimizer in enumerate(some)}
    for optimizer in named.values():
        if not hasattr(optimizer, "param_groups"):
            raise InspectError(f"an optimizer is expected, not {_kind_of(optimizer)}.")
    return named


def _ways_to_call(network: nn.Module, batch: Any) -> list[Callable[[nn.Module], Any]]:
    """Return the calls to try, the likeliest first."""
    whole = [lambda model: model(batch)]
    parameters = [
        parameter
        for parameter in parameters_of(network.forward) or []
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)
    ]
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        names = {parameter.name for parameter in parameters_of(network.forward) or []}
        known = {name: value for name, value in batch.items() if name in names}
        by_name = [lambda model: model(**known)] if known else []
        return [*by_name, *whole, lambda model: model(**batch)]
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        required = sum(parameter.default is parameter.empty for parameter in parameters)
        counts = dict.fromkeys([min(max(required, 1), len(batch)), len(batch)])
        cut = [lambda model, count=count: model(*batch[:count]) for count in counts]
        return [*cut, *whole] if len(batch) > 1 or required < 2 else [*whole, *cut]
    return whole


def losses_in(result: Any) -> dict[str, torch.Tensor]:
    """Return the losses in what a step or a model gave, by name: a tensor, one called `loss`, or a nest of scalars."""
    inner = getattr(result, "loss", None)
    if inner is None and isinstance(result, Mapping):
        inner = result.get("loss")
    if isinstance(inner, torch.Tensor):
        result = inner
    if isinstance(result, torch.Tensor):
        return {"": result}
    if isinstance(result, Mapping):
        pairs = list(result.items())
    elif isinstance(result, (tuple, list)):
        pairs = list(enumerate(result))
    else:
        return {}
    return {str(name): value for name, value in pairs if isinstance(value, torch.Tensor) and value.numel() == 1}
