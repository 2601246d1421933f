"""
What `trust_remote_code=True` runs neither opens the network, nor starts a process, nor writes a file on its own.

On its own: when it is imported, and in `from_pretrained` of a folder, `forward`, a training step, `generate`,
`encode_images`, an `ImageMemoryStore` without a folder, and a chat about pictures that are given as objects or paths. Python
reports connections, processes and writes to audit hooks; here the whole process is watched, the libraries included, and
nothing may be reported but the copies that transformers makes in its own module cache. Native code reports nothing:
folders are compared as well, and the source is read: what writes or fetches is called by the functions below alone, when a
caller asks.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.tiny import digit_image, make_model, make_processor
from visualchat.hub.push import EXCEPTIONS


WATCH = """
import json, os, sys
sys.modules["modeling_visualchat"] = None  # importing it raises
import torch, PIL.Image, transformers
from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil, PreTrainedTokenizerFast

NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
events = []


def report(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or not flags & WRITE_FLAGS or path == os.devnull:
            return
    elif not (event in NETWORK or event in PROCESSES or event in WRITES or event.startswith("shutil.")):
        return
    if event not in NETWORK + PROCESSES:
        paths = [os.path.abspath(os.fsdecode(arg)) for arg in args if isinstance(arg, (str, bytes, os.PathLike))]
        written = {"open": paths[:1], "shutil.copyfile": paths[1:2]}.get(event, paths)
        if written and all(path.startswith(cache) for path in written) and not is_running():
            return
    events.append([event, repr(args)])


def is_running():  # traveling code
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(cache):
        frame = frame.f_back
    return frame is not None


cache = os.path.join(os.environ["HF_HOME"], "modules")
folder = sys.argv[1]
sys.addaudithook(report)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
"""
ON_ITS_OWN = """
picture = PIL.Image.open("picture.png")
chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
parts = [{"type": "image", "image": picture}, {"type": "image", "path": "picture.png"}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **chat)
for settings in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}):
    model.generate(**inputs, max_new_tokens=4, **settings)
model.train()
model(**inputs, labels=inputs["input_ids"]).loss.backward()
model.eval()
memory = model.encode_images(inputs["pixel_values"])
module = sys.modules[type(memory).__module__]
model.generate(**{**inputs, "pixel_values": None}, image_memory=memory, max_new_tokens=2)
module.ImageMemoryStore(model, max_bytes=2**20).get(inputs["pixel_values"])
session = model.start_chat(processor)
session.send("What?", [picture, "picture.png"], max_new_tokens=4)
"".join(session.send("And?", stream=True, max_new_tokens=4))
print(json.dumps(events))
"""
ASKED_FOR = """
seen = {}
picture = PIL.Image.open("picture.png")
session = model.start_chat(processor)
session.send("What?", picture, max_new_tokens=2)
seen["on its own"] = sorted({event for event, _ in events})


def record(name, action):
    del events[:]
    try:
        action()
    except ValueError:  # nothing listens at the address
        pass
    seen[name] = sorted({event for event, _ in events})


loading = sys.modules[type(processor).__module__.rsplit(".", 1)[0] + ".image_loading_visualchat"]
record("load_image of a URL", lambda: loading.load_image("http://127.0.0.1:9/picture.png"))
record("ChatSession.save", lambda: session.save("saved"))
record("save_pretrained", lambda: processor.save_pretrained("processor"))
print(json.dumps(seen))
"""
HARMFUL = """
import socket, subprocess
open("imported", "w").close()
_forward = VisualChatLinearProjector.forward


def _harmful_forward(self, features):
    subprocess.run(["true"])
    socket.socket(type=socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
    open(__file__ + ".txt", "w").close()  # in transformers' cache
    return _forward(self, features)


VisualChatLinearProjector.forward = _harmful_forward
"""
# Calls that write or fetch, and the functions that may make them
WRITING = {
    "save",
    "save_file",
    "save_pretrained",
    "makedirs",
    "mkdir",
    "unlink",
    "utime",
    "write",
    "write_text",
    "write_bytes",
    "dump",
    "fetch_image",
}
ALLOWED = {
    ("image_memory_visualchat", "ImageMemory.save"),
    ("image_memory_visualchat", "ImageMemoryStore._write"),  # into the folder that it is given
    ("image_memory_folder_visualchat", "ImageMemoryFolder.__init__"),  # makes that folder
    ("image_memory_folder_visualchat", "ImageMemoryFolder.touch"),
    ("image_memory_folder_visualchat", "ImageMemoryFolder._scan"),  # deletes what a process that died has begun
    ("image_memory_folder_visualchat", "ImageMemoryFolder._delete_oldest"),
    ("chat_saving_visualchat", "save_conversation"),
    ("chat_saving_visualchat", "_remove"),  # what it has written itself
    ("chat_saving_visualchat", "_sync"),  # opens a folder, to read
    ("image_loading_visualchat", "load_image"),
}
# What the card names, where it is another function
CALLED_BY = dict.fromkeys(("save_conversation", "_remove", "_sync"), "ChatSession.save")
FORBIDDEN_MODULES = {
    *("asyncio", "ctypes", "ftplib", "http", "httpx", "httpx2", "importlib", "multiprocessing", "pickle", "pty", "requests"),
    *("runpy", "shutil", "signal", "smtplib", "socket", "ssl", "subprocess", "tempfile", "urllib"),
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "fork",
    "execv",
    "execve",
    "spawnv",
    "posix_spawn",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model(image_number_keys=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def run_watched(code: str, folder: Path, cwd: Path):
    """What code prints, as JSON, when it is run in a fresh process after loading `folder`, with empty caches."""
    digit_image(0).save(cwd / "picture.png")
    environment = {**os.environ, "HF_HOME": str(cwd / "home"), "TMPDIR": str(cwd / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    (cwd / "tmp").mkdir()
    (cwd / "home" / "modules").mkdir(parents=True)
    result = subprocess.run(
        [sys.executable, "-c", WATCH + code, str(folder)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def list_files(folder: Path) -> dict[str, int]:
    """The modification time of each file, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_it_does_nothing_on_its_own(folder, tmp_path):
    before = list_files(folder)
    events = run_watched(ON_ITS_OWN, folder, tmp_path)
    assert not events, "\n".join(f"{event}{args}" for event, args in events)
    assert list_files(folder) == before
    written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {("picture.png",), ("home", "modules")}


def test_the_watch_sees_harmful_code_and_what_a_caller_asks_for(folder, tmp_path):
    """Else the test above would show nothing."""
    harmful = shutil.copytree(folder, tmp_path / "harmful")
    with (harmful / "projector_visualchat.py").open("a") as file:
        file.write(HARMFUL)
    seen = run_watched(ASKED_FOR, harmful, tmp_path)
    assert set(seen["on its own"]) == {"open", "socket.connect", "subprocess.Popen"}
    assert "socket.connect" in seen["load_image of a URL"]
    assert "open" in seen["ChatSession.save"] and "open" in seen["save_pretrained"]


def test_only_named_functions_write_or_fetch(folder):
    """In the source, where native code, such as safetensors', is seen too."""
    found = set()
    for path in folder.glob("*.py"):
        for where, node in walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                used = {name.split(".")[0] for name in names} & FORBIDDEN_MODULES
                assert (isinstance(node, ast.ImportFrom) and node.level) or not used, f"{path.name}, {where}: {used}"
            elif isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                is_method = isinstance(node.func, ast.Attribute)
                assert name not in FORBIDDEN_CALLS or (is_method and name in ("eval", "compile")), (
                    f"{path.name}, {where}: {name}"
                )
                modes = [*node.args[1:2], *(one.value for one in node.keywords if one.arg == "mode")]
                opens_to_write = name == "open" and any(
                    not isinstance(one, ast.Constant) or set("wax+") & set(one.value) for one in modes
                )
                if name in WRITING or opens_to_write:
                    found.add((path.stem, where))
    assert found == ALLOWED


def walk(node: ast.AST, where: str = ""):
    """Every node with the qualified name of the function or class around it."""
    for child in ast.iter_child_nodes(node):
        yield where, child
        is_scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from walk(child, f"{where}.{child.name}".strip(".") if is_scope else where)


def test_the_card_names_what_writes_or_fetches():
    named = " ".join(EXCEPTIONS)
    for _, function in ALLOWED:
        function = CALLED_BY.get(function, function)
        assert function in named or function.split(".")[0] in named
