"""transformers' OpenAI-like server on a merged export, which takes another export in the same place without a restart.

`POST /reload` reads the folder again. The new model is loaded beside the old one, and takes its place between two requests; until
then, and if the new export cannot be used, the old one answers.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.errors import UserError, require
from ubsmoe.export import save_load as exports
from ubsmoe.export.sidecar import Sidecar, beyond_stock


def read_merged(folder: Path) -> Sidecar:
    """The sidecar of a whole merged export. Raises UserError for anything else."""
    sidecar = exports.read(folder)
    if sidecar.format != "merged":
        raise ConfigError(
            f"{folder} is a {sidecar.format} export, and the server loads whole models; make one of the run with "
            "`ubsmoe export RUN --format merged`"
        )
    return sidecar


def described(folder: Path, sidecar: Sidecar) -> list[str]:
    """What is served, and what plain transformers leaves out of it."""
    left_out = [f"left out: {sentence}" for sentence in beyond_stock(sidecar, sidecar.top_k)]
    return [f"{folder}: K={sidecar.top_k}; the model's name in requests is {folder}", *left_out]


class Served:
    """The model that answers, and how another takes its place.

    Args:
        folder: of a merged export.
        log: called with a line for what is served, and for what is refused.
    """

    def __init__(self, folder: Path, log: Callable[[str], None] = print) -> None:
        self._folder, self._log, self._one_at_a_time = folder, log, threading.Lock()
        self.manager: Any = _loaded(folder)

    def reload(self) -> list[str]:
        """Take what is in the folder now; gives its description.

        Raises:
            UserError: if it is no merged export, or cannot be loaded; the old one goes on answering.
        """
        with self._one_at_a_time:
            try:
                lines = described(self._folder, read_merged(self._folder))
                new = _loaded(self._folder)
            except (
                ValueError,
                RuntimeError,
                OSError,
                KeyError,
            ) as error:  # ours, or what transformers raises for odd files
                raise UserError(f"{self._folder} was not taken, the model before goes on answering: {error}") from error
            self.manager.loaded_models.update(new.loaded_models)
            for line in lines:
                self._log(line)
            return lines


def serve(folder: Path, port: int, log: Callable[[str], None] = print) -> None:
    """Serve a merged export on 127.0.0.1 until the process is stopped.

    Raises:
        UserError: if there is no merged export, or the extra `serve` is missing.
    """
    sidecar = read_merged(folder)
    for module in ("fastapi", "uvicorn", "openai", "accelerate"):
        require(module, "serve")
    import uvicorn

    for line in described(folder, sidecar):
        log(line)
    uvicorn.run(application(Served(folder, log), log), host="127.0.0.1", port=port, log_level="info")


def application(served: Served, log: Callable[[str], None] = print) -> Any:
    """transformers' own application, with /reload beside its routes."""
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    manager, state = served.manager, GenerationState()
    handlers = (
        kind(model_manager=manager, generation_state=state)
        for kind in (ChatCompletionHandler, CompletionHandler, ResponseHandler, TranscriptionHandler, SystemOneHandler)
    )
    app = build_server(manager, *handlers, generation_state=state)

    def reload() -> Any:
        try:
            return {"serves": served.reload()}
        except UserError as error:
            log(f"ubsmoe: {error}")
            return JSONResponse({"error": str(error)}, status_code=409)

    app.post("/reload")(reload)
    return app


def _loaded(folder: Path) -> Any:
    """transformers' manager of models, with the model of this folder in it, whatever requests ask for."""
    from transformers.cli.serving.model_manager import ModelManager

    return ModelManager(force_model=str(folder))
