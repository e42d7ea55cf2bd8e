"""script/ui: serves the page to the browser of this machine."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path

from clip_gen.files import checkpoints_folder, set_compile_cache_folders
from clip_gen.weights.default_model import BUNDLED, default_model

# The browser gets all from this server. Gradio's image editor builds shaders with eval().
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
# Read when Gradio and huggingface_hub, which it imports, are imported: no telemetry, no requests to other servers.
OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


class SecurityHeaders:
    """ASGI middleware that lets the browser load and send nothing but from and to this server."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: MutableMapping, receive: Callable, send: Callable) -> None:
        async def send_with_headers(message: MutableMapping) -> None:
            if message["type"] == "http.response.start":
                headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in headers.items())]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("script/ui", description="Serves a page to draw on, to this machine alone.")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    parser.add_argument("--model", help="the first model: a folder, a weights tar or a URL; default: as script/predict")
    history = checkpoints_folder().parent / "drawings"
    parser.add_argument("--history", type=Path, default=history, help=f"folder for the drawings; default {history}")
    return parser


def main(arguments: list[str]) -> None:
    """Serves until Ctrl-C. OSError if the port is in use, ValueError if the model cannot be used."""
    options = option_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_compile_cache_folders()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are removed
    with tempfile.TemporaryDirectory(prefix="clip-gen-ui-") as uploads:
        os.environ.update(OFFLINE | {"GRADIO_TEMP_DIR": uploads})
        # Imported here, after the settings above.
        import gradio as gr
        from starlette.middleware import Middleware

        from clip_gen.ui.history import History
        from clip_gen.ui.models import Models
        from clip_gen.ui.page import CSS, Page

        check_port(options.port)
        name = options.model or model_name(default_model(os.environ.get("COG_WEIGHTS"))[0])
        models, history = Models(), History(options.history.resolve())
        models.get(name)
        page = Page(models, history, name)
        page.blocks.launch(
            server_name="127.0.0.1",
            server_port=options.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[str(history.folder)],
            app_kwargs={"middleware": [Middleware(SecurityHeaders)]},
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
        )
        print(f"http://127.0.0.1:{options.port} has the page; Ctrl-C ends it. Drawings are kept in {history.folder}")
        try:
            page.blocks.block_thread()
        finally:
            page.close()


def check_port(port: int) -> None:
    """Tries to listen there. ValueError with the reason."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError) as error:
        reason = (
            "is in use" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else f"is no use: {error}"
        )
        raise ValueError(f"port {port} {reason}; give another one, as in script/ui --port 7861") from error


def model_name(weights: str) -> str:
    """The name under which the page lists a model."""
    inside = Path(weights).parent == BUNDLED.parent
    return f"checkpoints/{Path(weights).name}" if inside else weights


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"script/ui: {error}")
