"""An OpenAI-compatible endpoint (`POST /chat/completions`), with the standard library alone.

What may pass by itself is tried again with a growing pause; what the user must mend is an error at
once. The key is sent to the endpoint and nowhere else: redirects are refused, no message shows it.
"""

import http.client
import json
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from fewstep.errors import RecipeError, RunError

J = TypeVar("J")
R = TypeVar("R")
Messages = Sequence[Mapping[str, Any]]
"""`role`, and as `content` a text or a list of parts: texts and images."""
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses that another try may cure; 529 is "overloaded" with some providers."""
LONGEST_WAIT = 120.0
"""Seconds; an endpoint that asks for a longer pause has run out of quota."""


class Usage(NamedTuple):
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unreported: int = 0
    """Requests whose reply gave no token counts."""

    def plus(self, other: "Usage") -> "Usage":
        return Usage(*(mine + theirs for mine, theirs in zip(self, other)))


class Reply(NamedTuple):
    text: str
    usage: Usage
    problem: str = ""
    """Why there is no text to use: refused by the endpoint, cut off, not in its format."""
    served: str = ""
    """The model that the endpoint says has answered."""
    final: bool = False
    """Refused: the same words again would be refused again."""


class EndpointDown(RunError):
    """No answer after every try; `reason` says why without the address."""

    def __init__(self, message: str, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


class _Refused(Exception):
    """One request the endpoint will not answer (400, 413, 422): the fault of that request."""


class _Passing(Exception):
    def __init__(self, reason: str, wait: float = 0.0, *, unreachable: bool = False) -> None:
        self.wait, self.unreachable = wait, unreachable
        super().__init__(reason)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, field: str) -> None:
        self.field = field

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        fp.close()
        parts = urllib.parse.urlsplit(newurl)
        raise RecipeError(
            f"{req.host} sends us on to {parts.scheme}://{parts.netloc}{parts.path}",
            field=self.field,
            hint="give that address if you trust it; a key is never sent on",
        )


class Endpoint:
    """`ask` may be called from several threads.

    `url` ends before /chat/completions. `pause` seconds before the second try, doubled each time.
    `url_field` and `model_field` are what the user calls them, for messages.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        key_name: str = "the key",
        timeout: float = 120.0,
        tries: int = 6,
        pause: float = 1.0,
        url_field: str = "--endpoint",
        model_field: str = "--model",
    ) -> None:
        self._url_field, self._model_field = url_field, model_field
        check_address(url, field=url_field, key_name=key_name)
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.tries, self.pause = model, timeout, tries, pause
        if key and (not key.isascii() or not key.isprintable() or key != key.strip()):
            raise RecipeError("holds blanks or other characters no key has", field=key_name)
        self._key, self._key_name = key, key_name
        self._opener = urllib.request.build_opener(_NoRedirects(url_field))
        self._reached = False

    def ask(self, messages: Messages, **fields: Any) -> Reply:
        """One reply; RecipeError for a wrong key, model or address, EndpointDown after `tries`."""
        body = json.dumps({"model": self.model, "messages": messages, **fields}).encode()
        for tried in range(1, self.tries + 1):
            try:
                return self._read(self._post(body))
            except _Refused as refused:
                usage = Usage(requests=1, unreported=1)
                return Reply("", usage, str(refused), final=True)
            except _Passing as passing:
                if passing.unreachable and not self._reached:
                    raise RecipeError(
                        f"{self.url} cannot be reached ({passing})",
                        field=self._url_field,
                        hint="is the server running, and the address right?",
                    ) from None
                if passing.wait > LONGEST_WAIT:
                    raise EndpointDown(
                        f"{self.url} asks for a pause of {passing.wait:.0f} s ({passing}); what "
                        "was written is kept, give the same command later",
                        f"asks for a pause of {passing.wait:.0f} s ({passing})",
                    ) from None
                if tried == self.tries:
                    raise EndpointDown(
                        f"{self.url} failed {tried} times ({passing}); what was written is kept, "
                        "the same command goes on",
                        f"failed {tried} times ({passing})",
                    ) from None
                # Half of the pause is drawn, so that threads do not return together.
                growing = min(self.pause * 2 ** (tried - 1), 60.0) * random.uniform(0.5, 1.0)
                time.sleep(max(passing.wait, growing))
        raise AssertionError("tries is at least 1")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "fewstep"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._verdict(error) from None
        except urllib.error.URLError as error:
            reason = error.reason
            late = isinstance(reason, TimeoutError)
            raise _Passing("no answer in time" if late else str(reason), unreachable=True) from None
        except TimeoutError:
            raise _Passing(f"no answer within {self.timeout:g} s") from None
        except (http.client.HTTPException, OSError) as error:
            raise _Passing(f"the connection broke off: {type(error).__name__}") from None

    def _verdict(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = _shown(error.read(2000), self._key)
        except (OSError, http.client.HTTPException):
            said = ""
        told = f"{error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code in (401, 403):
            given = "was refused" if self._key else "is not set"
            hint = "set the environment variable to a key of this endpoint"
            return RecipeError(f"{given} ({told})", field=self._key_name, hint=hint)
        if error.code == 404:
            return RecipeError(
                f"{self.url} knows no such path or no model {self.model!r} ({told})",
                field=self._model_field,
                hint="the address mostly ends in /v1, and lists its models under /v1/models",
            )
        if error.code in _PASSING:
            return _Passing(told, _seconds(error.headers.get("Retry-After")))
        if not self._reached:
            return RecipeError(f"the first request was refused ({told})", field=self._url_field)
        return _Refused(f"refused ({error.code})")

    def _read(self, content: bytes) -> Reply:
        """Text and tokens of a reply; what is no chat completion is tried again."""
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            counts = answer.get("usage") or {}
            tokens_in = int(counts.get("prompt_tokens") or 0)
            tokens_out = int(counts.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Passing("the reply is no chat completion in JSON") from None
        if not isinstance(text, str):
            raise _Passing("the reply holds no text")
        self._reached = True
        usage = Usage(1, tokens_in, tokens_out, unreported=int(not (tokens_in or tokens_out)))
        served = answer.get("model")
        problem = _PROBLEMS.get(choice.get("finish_reason"), "")
        refusal = choice["message"].get("refusal")
        if refusal and not text:
            problem = problem or f"refused: {' '.join(str(refusal).split())[:200]}"
        return Reply(text, usage, problem, served if isinstance(served, str) else "")


_PROBLEMS = {
    "length": "cut off at max_tokens",
    "content_filter": "stopped by the endpoint's content filter",
}


def check_address(url: str, *, field: str, key_name: str) -> None:
    """RecipeError for what is no address, or holds more than one."""
    if "@" in url or "?" in url:
        raise RecipeError(
            "an address with a user, a password or a query",
            field=field,
            hint=f"give the address alone and put the key into {key_name}",
        )
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise RecipeError(
            f"{url!r} is no address", field=field, hint="such as http://localhost:8000/v1"
        )


def replies(ask: Callable[[J], R], jobs: "deque[J]", workers: int) -> Iterator[tuple[J, R]]:
    """Replies as they come, `workers` requests at a time; `jobs` may be added to meanwhile.

    The threads are daemons, so that Ctrl-C does not wait for a slow endpoint.
    """
    todo: queue.Queue[J | None] = queue.Queue()
    done: queue.Queue[tuple[J, R | Exception]] = queue.Queue()

    def work() -> None:
        while (job := todo.get()) is not None:
            try:
                done.put((job, ask(job)))
            except Exception as error:
                # Handed to the caller's thread, which raises it.
                done.put((job, error))

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    flying = 0
    try:
        while jobs or flying:
            while jobs and flying < workers:
                todo.put(jobs.popleft())
                flying += 1
            job, reply = done.get()
            flying -= 1
            if isinstance(reply, Exception):
                raise reply
            yield job, reply
    finally:
        for _ in range(workers):
            todo.put(None)


def json_in(text: str) -> Any:
    """The first JSON object or list in a reply; None where there is none."""
    return next(every_json_in(text), None)


def every_json_in(text: str) -> Iterator[Any]:
    """The JSON objects and lists of a reply, after a model's thoughts and inside fences; what lies
    inside one of them is not counted again."""
    answer = re.sub(r"(?s)^.*</think>", "", text)
    decoder, end = json.JSONDecoder(), 0
    for start in re.finditer(r"[{\[]", answer):
        if start.start() < end:
            continue
        try:
            found, end = decoder.raw_decode(answer, start.start())
        except ValueError:
            continue
        yield found


def _shown(content: bytes, key: str | None) -> str:
    """What an endpoint says of an error, on one line and without the key it may repeat."""
    text = content.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)["error"]
        text = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, TypeError):
        pass
    if key:
        text = text.replace(key, "***")
    return " ".join(str(text).split())[:200]


def _seconds(retry_after: str | None) -> float:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
