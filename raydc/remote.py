"""One object that lives here or as a Ray actor, values that all processes read, and a board of messages. Beside Ray
it loads nothing large: actors load it, and data processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from raydc.clustering.bank import CoverageError


class Remote:
    """One object, in this process or as an actor, with the same methods either way.

    ``remote.method(...)`` waits for the result; ``remote.send("method", ...)`` does not, but lets only a few calls be
    under way; ``flush`` waits for those. ``start("method", ...)`` does not either: what it returns waits for the result.
    An actor that died comes back empty: CoverageError. ``spread``: on another node than its like, where there are several.
    """

    MOST_UNDER_WAY = 4

    def __init__(
        self, cls: type, *args, local: bool, num_cpus: float = 1, num_gpus: float = 0, spread: bool = False, **kwargs
    ) -> None:
        self._pending: list = []
        if local:
            self._object, self._actor = cls(*args, **kwargs), None
        else:
            options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 3, "max_task_retries": 1}
            options |= {"scheduling_strategy": "SPREAD"} if spread else {}
            self._object, self._actor = None, ray.remote(cls).options(**options).remote(*args, **kwargs)

    def __getattr__(self, method: str) -> Callable:
        if method.startswith("_"):
            raise AttributeError(method)
        if self._actor is None:
            return getattr(self._object, method)
        return lambda *args, **kwargs: self._get(getattr(self._actor, method).remote(*args, **kwargs))

    def send(self, method: str, *args) -> None:
        if self._actor is None:
            getattr(self._object, method)(*args)
            return
        self._pending.append(getattr(self._actor, method).remote(*args))
        if len(self._pending) >= self.MOST_UNDER_WAY:
            self._get(self._pending.pop(0))

    def start(self, method: str, *args) -> Callable[[], Any]:
        if self._actor is None:
            result = getattr(self._object, method)(*args)
            return lambda: result
        ref = getattr(self._actor, method).remote(*args)
        return lambda: self._get(ref)

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        for ref in pending:
            self._get(ref)

    @staticmethod
    def _get(ref):
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError:
            raise CoverageError("the process that held it died, and what it held is lost") from None


class Shared:
    """A value put into the object store once; each node keeps one copy that its workers read in place."""

    def __init__(self, value: Any, *, local: bool) -> None:
        self._value = value if local else None
        self._refs = [] if local else [value if isinstance(value, ray.ObjectRef) else ray.put(value)]
        self.key = "" if local else self._refs[0].hex()  # tells it from others, also in another process

    def get(self) -> Any:
        return ray.get(self._refs[0]) if self._refs else self._value


class Board:
    """Messages on their way from workers to the driver's console."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []

    def post(self, kind: str, value: Any) -> None:
        self.messages.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        taken, self.messages = self.messages, []
        return taken
