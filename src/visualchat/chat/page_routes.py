# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The HTTP routes that the web page needs, with limits of what is sent to them.

Gradio serves many more: functions by name, what the page is made of, a monitor of the traffic, the states of visitors as
files, files that it fetches from other machines. The page needs none of these, and its visitors do neither.
"""

import os
import re

from gradio.utils import get_upload_folder
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modeling_visualchat.messages_visualchat import MAX_TEXT_LENGTH


API = "/gradio_api"
UPLOAD, CALL = f"{API}/upload", f"{API}/queue/join"
# The page itself; `startup-events` is what Gradio asks itself before it says that it runs, `app_id` what the page asks after
# a lost connection
READ = re.compile(
    r"/|/(?:theme\.css|favicon\.ico|robots\.txt|(?:assets|static)/.+)"
    + rf"|{API}/(?:startup-events|app_id|queue/data|heartbeat/[^/]+)"
)
CALL_BYTES = 8 * MAX_TEXT_LENGTH  # a question and, if it is edited, the earlier one, of four bytes a character
PART_BYTES = 2**16  # what else a request holds: settings, or the names of files


class PageRoutes:
    """
    Refuses what the page does not need (status 404), and bodies of requests that are too large (413) or of which that is not
    known (411).

    Args:
        app (`ASGIApp`): Gradio's application.
        max_upload_bytes (`int`): The largest size of the files of an upload, together.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int):
        self.app, self.limits = app, {UPLOAD: max_upload_bytes, CALL: CALL_BYTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._find_refusal(scope)
        if refusal:
            await refusal(scope, receive, send)
        else:
            await self.app(scope, _whole_body(receive) if scope["path"] == UPLOAD else receive, send)

    def _find_refusal(self, scope: Scope) -> Response | None:
        path, headers = scope["path"], Headers(scope=scope)
        if scope["method"] in ("GET", "HEAD"):
            # Gradio would fetch URLs as well
            is_open = READ.fullmatch(path) or path.startswith(f"{API}/file={get_upload_folder()}{os.sep}")
            return None if is_open else PlainTextResponse("Not found", 404)
        limit = self.limits.get(path) if scope["method"] == "POST" else None
        if limit is None:
            return PlainTextResponse("Not found", 404)
        length = headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in headers:
            return PlainTextResponse("The size of the request is not given: send Content-Length", 411)
        if int(length) > limit + PART_BYTES:
            counts = f"{int(length):,} bytes, at most {limit:,} are allowed"
            # The page shows either
            return (
                PlainTextResponse(f"The files have {counts}", 413)
                if path == UPLOAD
                else JSONResponse({"detail": f"The message has {counts}"}, 413)
            )
        return None


def _whole_body(receive: Receive) -> Receive:
    """For an upload that breaks off, the error upon which Gradio removes what has arrived. It would leave it there."""

    async def receive_whole() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise MultiPartException("The upload broke off")
        return message

    return receive_whole
