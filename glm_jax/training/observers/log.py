"""The log: an event every few steps, and the progress bar."""

from __future__ import annotations

from glm_jax.training.observers import Observer, Step
from glm_jax.workdir.events import Event


class Log(Observer):
    """Logs every train.log_every steps and the last one, with the speed since the last event; moves the bar."""

    def after(self, step: Step) -> None:
        run, shown = step.run, None
        if step.is_due(run.current.train.log_every):
            event = step.event() | run.stretch.meter.read()
            run.log(event)
            shown = summary(event)
        run.monitor.progress(1, shown)


def summary(event: Event) -> dict[str, str]:
    """Return what the bar shows of a train event: losses by objective, gradient norm, tokens/s and MFU."""
    shown = {name.removeprefix("loss/"): f"{event[name]:.3f}" for name in event if name.startswith("loss/")}
    return {
        **shown,
        "grad": f"{event['grad_norm']:.2f}",
        "tokens/s": f"{event['tokens_per_second']:,.0f}",
        "mfu": f"{event['mfu']:.1%}",
    }
