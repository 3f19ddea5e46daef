"""Debian's Chromium, driven over its debugging pipe: what a page looks like to one who opens it.

The DevTools protocol is JSON over two pipes, with a NUL behind each message: no library is needed to speak it.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH: `apt-get install chromium` (Debian), then these tests run"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-extensions --remote-debugging-pipe"
)


class Chromium:
    """One tab. ``complaints`` are what the console and the browser's log said; ``asked`` the addresses it loaded."""

    def __init__(self, folder: Path):
        there, commands = os.pipe()
        answers, back = os.pipe()
        # The shell puts the pipes where Chromium wants them, in 3 and 4; by way of two that are free.
        shell = f'exec {{a}}<&{there} {{b}}>&{back}; exec 3<&$a 4>&$b; exec "$@"'
        command = ["bash", "-c", shell, "chromium", str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [*command, "about:blank"], pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self.commands, self.answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self.rest, self.number, self.session = b"", 0, None
        self.events: list[dict] = []
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.rest:
            got = os.read(self.answers.fileno(), 1 << 16)
            assert got, "Chromium has gone"
            self.rest += got
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, path: Path, width: int, height: int, dark: bool = False, script: bool = True) -> None:
        """Loads a file as a phone does (narrower than 600) or a desk, and forgets what was heard before."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.call("Runtime.evaluate", expression="0")  # what was said until now is read before it is answered

    def evaluate(self, expression: str) -> Any:
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the first that the selector finds."""
        place = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); found.scrollIntoView("
            "{block: 'center', inline: 'center', behavior: 'instant'}); const box = found.getBoundingClientRect(); "
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2} })()"
        )
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, **place, button="left", clickCount=1)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    @property
    def complaints(self) -> list[str]:
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in said]

    @property
    def asked(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(timeout=20)
        self.commands.close()
        self.answers.close()
