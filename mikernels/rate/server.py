# SPDX-License-Identifier: Apache-2.0
"""The page on which a person rates, served on this machine's loopback address and nowhere else.

A page of another site that is open in the same browser can send requests here, and a name of its
own can be made to mean 127.0.0.1. So every request must know the secret in the address, be for the
loopback address by name (Host), and if it changes anything come from our own page (Origin) as JSON.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flask
from werkzeug.serving import WSGIRequestHandler, make_server

from mikernels._pages import visible
from mikernels.files import parse_json
from mikernels.rate.session import Session
from mikernels.schema import Entry, Passage, RatedItem, Turn, check

HOST = "127.0.0.1"
# shades of a token, 0 is none
SHADES = 9
WORDS = {
    ("feature", "detection"): {
        "lede": "Each text below makes one feature of a language model active at the shaded "
        "tokens; the darker, the stronger.",
        "ask": "In which of these texts is the same feature active?",
        "more": "About half of them. It may be at any token, and weak.",
        "yes": "Active",
        "no": "Not active",
    },
    ("feature", "fuzzing"): {
        "lede": "Each text below makes one feature of a language model active at the shaded "
        "tokens; the darker, the stronger.",
        "ask": "In which of these texts are the shaded tokens those at which it is active?",
        "more": "In about half of them others are shaded.",
        "yes": "Right tokens",
        "no": "Wrong tokens",
    },
    ("component", "fuzzing"): {
        "lede": "One component of a language model acts at the shaded tokens of each text: it adds "
        "to the answer at red ones, and takes from it at blue ones; the darker, the more.",
        "ask": "In which of these texts are the shaded tokens those at which it acts?",
        "more": "In about half of them others are shaded.",
        "yes": "Right tokens",
        "no": "Wrong tokens",
    },
}


def shaded(passage: Passage, most: float) -> list[dict[str, Any]]:
    """Tokens with a shade in -SHADES..SHADES each; of none of them with `most` = 0."""
    peak = max(abs(score) for score in passage.scores)
    found = []
    for token, score in zip(passage.tokens, passage.scores, strict=True):
        share = min(1.0, abs(score) / most) if most else 0.0
        # what is there at all is seen
        shade = max(round(SHADES * share), 1 if share >= 0.02 else 0)
        side = "minus" if score < 0 else "plus"
        # not where it would tell: a passage of which nothing is shown
        strongest = bool(most) and peak > 0 and abs(score) == peak
        # a space before a word is not shaded: at the end of a line it would be alone
        word = token.lstrip(" ") if token.strip() else token
        found.append(
            {
                "space": token[: len(token) - len(word)],
                "text": visible(word),
                "shade": shade,
                "side": side,
                "peak": strongest,
            }
        )
    return found


def shown_passages(item: RatedItem, turn: Turn, game: str) -> dict[str, Any]:
    """Evidence and questions as the page has them, without a trace of what they are."""

    def own(passage: Passage) -> float:
        return max(map(abs, passage.scores))

    detection = game == "detection"
    # a weak example looks weak; but where scores are asked about, their size must not tell
    most = max(map(own, item.evidence))
    evidence = [shaded(p, most if detection else own(p)) for p in item.evidence]
    asked = [item.questions[i] for i in turn.order]
    questions = [shaded(q, 0.0 if detection else own(q)) for q in asked]
    return {"evidence": evidence, "questions": questions}


def make_app(session: Session, secret: str, port: int, ended: Callable[[], None]) -> flask.Flask:
    """The pages of a session.

    Args:
        secret: the first part of every path. port: that it will be served on.
        ended: called when the last turn is finished.
    """
    app = flask.Flask("mikernels.rate", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1 << 16
    lock = threading.Lock()
    hosts = (f"{HOST}:{port}", f"localhost:{port}")

    @app.before_request
    def refuse_strangers() -> None:
        request = flask.request
        if request.host not in hosts:
            flask.abort(403, "not asked for by the name of this machine")
        given = (request.view_args or {}).get("secret", "")
        if not hmac.compare_digest(given.encode(), secret.encode()):
            flask.abort(404)
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("Origin", "")
            if origin != f"http://{request.host}" or request.mimetype != "application/json":
                flask.abort(403, "not sent by this page")

    @app.after_request
    def closed(response: flask.Response) -> flask.Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        )
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/<secret>/")
    def page(secret: str) -> str:
        with lock:
            current, turns = session.current, session.ratings.turns
            values: dict[str, Any] = {"secret": secret, "total": len(turns), "current": current}
            if current is None:
                return flask.render_template("done.html", **values)
            turn = turns[current]
        item, items = session.item(turn), session.items
        values |= {"turn": turn, "words": WORDS[items.kind, items.game]}
        return flask.render_template(
            "page.html", **values, **shown_passages(item, turn, items.game)
        )

    @app.get("/<secret>/static/<name>")
    def static(secret: str, name: str) -> flask.Response:
        return flask.send_from_directory("static", name)

    @app.post("/<secret>/save")
    def save(secret: str) -> tuple[dict[str, Any], int]:
        try:
            raw = parse_json(flask.request.get_data())
            entry = check(Entry, raw, "rate", "what is sent", "reload the page")
            with lock:
                session.save(entry)
                last = entry.finish and session.current is None
        except IndexError as error:
            return {"error": str(error)}, 409
        except ValueError as error:
            return {"error": str(error)}, 400
        except OSError as error:
            return {"error": str(error)}, 507
        if last:
            ended()
        return {}, 200

    return app


class _Quiet(WSGIRequestHandler):
    """The terminal is for the address and the end; a log would show the secret again and again."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on the loopback address.

    Raises:
        OSError: the port is taken, or not allowed.
    """
    try:
        bound = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise OSError(
            getattr(error, "errno", None) or 0,
            f"rate: --port must be free on {HOST}, got {port}: {error}; leave it out for any",
        ) from error
    with bound:
        yield bound


def serve(
    session: Session, port: int, ready: Callable[[str], None], ended: Callable[[], None]
) -> None:
    """Serve until KeyboardInterrupt, which ends it quietly.

    Args:
        port: 0 for any. ready: called with the address. ended: as for `make_app`.
    """
    secret = secrets.token_urlsafe(16)
    with listening(port) as bound:
        port = bound.getsockname()[1]
        app = make_app(session, secret, port, ended)
        server = make_server(
            HOST, port, app, threaded=True, request_handler=_Quiet, fd=bound.fileno()
        )
        try:
            ready(f"http://{HOST}:{port}/{secret}/")
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
