"""The calls of a training script, against an engine in memory."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import flarebus.client as flare
from flarebus.client.engine import Seat, seat_of_caller, set_fallback, sit
from flarebus.errors import ClientApiError, Closed, ConfigError, FlarebusError, UsageError
from tests.client.fake_engine import LIMIT_S, FakeEngine

Sit = Callable[..., FakeEngine]


def weights(value: float = 1.0) -> flare.FLModel:
    return flare.FLModel(params={"w": np.full(3, value, np.float32)})


# --- init


def test_init_outside_a_job_says_how_to_run_the_script() -> None:
    """A script started by hand learns that it needs a recipe."""
    with pytest.raises(ClientApiError, match="train_script"):
        flare.init()


@pytest.mark.parametrize(
    "call",
    [
        flare.receive,
        lambda: flare.send(weights()),
        flare.is_running,
        flare.is_train,
        flare.is_evaluate,
        flare.is_submit_model,
        lambda: flare.log("loss", 1.0, flare.AnalyticsDataType.SCALAR),
        flare.system_info,
        flare.get_config,
        flare.get_job_id,
        flare.get_site_name,
        flare.get_task_name,
        flare.clear,
        flare.shutdown,
    ],
)
def test_every_call_before_init_is_an_error(engine: FakeEngine, call: Callable[[], Any]) -> None:
    """No call works before init, and the error is a RuntimeError that names init."""
    with pytest.raises(RuntimeError, match=r"flare\.init\(\)"):
        call()


def test_init_twice_gives_the_same_context_and_a_warning(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    """The same arguments again change nothing; an implied rank equals the explicit one."""
    first = flare.init()

    assert flare.init(rank="0") is first
    assert "again" in caplog.text


def test_first_context_is_the_default(engine: FakeEngine) -> None:
    """A second context is only used where it is given."""
    flare.init()
    second = flare.init(rank=1)

    assert flare.system_info() == flare.system_info(ctx=second) == {"job_id": "job-7", "site_name": "site-1"}
    with pytest.raises(ClientApiError, match="rank 1"):
        flare.get_task_name(ctx=second)


def test_rank_comes_from_the_environment(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument the variable RANK names the rank."""
    monkeypatch.setenv("RANK", "3")

    assert flare.init().rank == "3"


@pytest.mark.parametrize(
    ("kwargs", "name"), [({"rank": 1.5}, "rank"), ({"rank": True}, "rank"), ({"config_file": 3}, "config_file")]
)
def test_init_refuses_wrong_types(engine: FakeEngine, kwargs: dict[str, Any], name: str) -> None:
    """A wrong argument is named."""
    with pytest.raises(ConfigError, match=name):
        flare.init(**kwargs)


def test_context_manager_shuts_down(engine: FakeEngine) -> None:
    """Leaving the context ends it; another init starts anew and shutdown may be repeated."""
    with flare.init() as context:
        assert flare.get_site_name() == "site-1"

    with pytest.raises(ClientApiError, match="shutdown"):
        flare.is_running()
    flare.shutdown()
    flare.shutdown(ctx=context)
    assert flare.init() is not context


def test_ctx_must_be_a_context(engine: FakeEngine) -> None:
    """Something else given as ctx is named."""
    flare.init()

    with pytest.raises(ConfigError, match="ctx"):
        flare.is_running(ctx="site-1")  # type: ignore[arg-type]


# --- the loop


def test_canonical_loop(engine: FakeEngine) -> None:
    """Every round is received, answered and counted; the end makes is_running False."""
    flare.init()
    for number in range(3):
        engine.give(weights(number), round=number, total=3)
    seen = []
    while flare.is_running():
        model = flare.receive()
        assert model is not None
        seen.append((model.current_round, model.total_rounds, float(model.params["w"][0])))
        flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, meta={"NUM_STEPS_CURRENT_ROUND": 5}))
        if len(seen) == 3:
            engine.end()

    assert seen == [(0, 3, 0.0), (1, 3, 1.0), (2, 3, 2.0)]
    answers = [engine.next_answer() for _ in range(3)]
    assert [float(answer.params["w"][0]) for answer in answers] == [1.0, 2.0, 3.0]
    assert [answer.current_round for answer in answers] == [0, 1, 2]
    assert answers[0].meta == {"NUM_STEPS_CURRENT_ROUND": 5}


def test_received_meta_names_job_site_and_round(engine: FakeEngine) -> None:
    """A received model tells where and when it is used, and keeps what the server said."""
    flare.init()
    engine.give(flare.FLModel(params={}, meta={"note": 1}), round=4, total=9)
    model = flare.receive()

    assert model is not None
    assert model.meta == {"note": 1, "job_id": "job-7", "site_name": "site-1", "current_round": 4, "total_rounds": 9}


def test_receive_gives_the_same_model_until_it_is_answered(engine: FakeEngine) -> None:
    """Asking again neither waits nor decodes again."""
    flare.init()
    taken = []
    engine.give(lambda: taken.append(1) or weights())

    assert flare.is_running()
    assert flare.is_running()
    assert taken == []
    assert flare.receive() is flare.receive()
    assert taken == [1]


def test_receive_without_is_running_gets_the_next_task_after_each_send(engine: FakeEngine) -> None:
    """A loop of receive and send alone serves every round, also when the models are kept."""
    flare.init()
    engine.give(weights(1))
    engine.give(weights(2))
    first = flare.receive()
    assert first is not None
    flare.send(first, clear_cache=False)
    second = flare.receive()

    assert second is not None
    assert second is not first
    assert float(second.params["w"][0]) == 2


def test_receive_that_times_out_allows_no_send(engine: FakeEngine) -> None:
    """Nothing came, so there is nothing to answer."""
    flare.init()

    assert flare.receive(timeout=0) is None
    with pytest.raises(ClientApiError, match="receive"):
        flare.send(weights())


@pytest.mark.parametrize("timeout", [-1, "3", True, float("nan")])
def test_receive_refuses_a_wrong_timeout(engine: FakeEngine, timeout: Any) -> None:
    """A timeout is a number from 0."""
    flare.init()

    with pytest.raises(ConfigError, match="timeout"):
        flare.receive(timeout=timeout)


@pytest.mark.parametrize("reason", ["completed", "aborted by ada"])
def test_end_and_abort_look_alike(engine: FakeEngine, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """is_running is False, receive is None, and the reason is logged once and kept."""
    context = flare.init()
    assert context.end_reason is None
    engine.end(reason)

    with caplog.at_level(logging.INFO, "flarebus.client"):
        assert not flare.is_running()
        assert not flare.is_running()
        assert flare.receive() is None
    assert context.end_reason == reason
    assert caplog.text.count(reason) == 1


def test_end_stops_a_loop_that_never_answers(engine: FakeEngine) -> None:
    """A script that leaves a task unanswered does not see it for ever."""
    flare.init()
    engine.give(weights())
    assert flare.is_running()
    flare.receive()
    engine.end()

    assert not flare.is_running()


def test_result_after_the_end_is_dropped_with_a_warning(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    """A script that was computing when the job was aborted comes to its end without an exception."""
    flare.init()
    engine.give(weights())
    flare.receive()
    engine.end("aborted by ada")
    flare.send(weights(2))

    assert engine.answers.empty()
    assert "aborted by ada" in caplog.text
    assert not flare.is_running()


def test_lost_model_is_an_error_and_the_next_task_goes_on(engine: FakeEngine) -> None:
    """A model that cannot be fetched is reported once; it is not fetched twice."""
    flare.init()

    def lost() -> flare.FLModel:
        raise Closed("the holder is gone")

    engine.give(lost)
    engine.give(weights(2))

    with pytest.raises(Closed):
        flare.receive()
    model = flare.receive()
    assert model is not None
    assert float(model.params["w"][0]) == 2


# --- send


def test_send_refuses_what_is_no_model(engine: FakeEngine) -> None:
    """The error is a usage error and a TypeError and names the type."""
    flare.init()
    engine.give(weights())
    flare.receive()

    with pytest.raises(TypeError, match="dict") as caught:
        flare.send({"w": 1})  # type: ignore[arg-type]
    assert isinstance(caught.value, UsageError)


def test_send_needs_params_or_metrics(engine: FakeEngine) -> None:
    """Neither is refused; an empty dict of either is something."""
    flare.init()
    for _ in range(2):
        engine.give(weights())
    flare.receive()
    with pytest.raises(ClientApiError, match="neither params nor metrics"):
        flare.send(flare.FLModel())

    flare.send(flare.FLModel(metrics={}))
    flare.receive()
    flare.send(flare.FLModel(params={}))
    assert engine.next_answer().metrics == {}
    assert engine.next_answer().params == {}


def test_second_send_is_refused(engine: FakeEngine) -> None:
    """One answer for each task."""
    flare.init()
    engine.give(weights())
    flare.receive()
    flare.send(weights())

    with pytest.raises(ClientApiError, match="answered already"):
        flare.send(weights())


def test_prefetched_task_is_not_received_yet(engine: FakeEngine) -> None:
    """is_running alone does not allow a send."""
    flare.init()
    engine.give(weights())
    assert flare.is_running()

    with pytest.raises(ClientApiError, match=r"needs a flare\.receive"):
        flare.send(weights())


def test_clear_cache_frees_both_models(engine: FakeEngine) -> None:
    """After send neither the sent nor the received model holds params; metrics stay."""
    flare.init()
    engine.give(weights())
    received = flare.receive()
    sent = flare.FLModel(params={"w": np.ones(3)}, optimizer_params={"m": np.ones(3)}, metrics={"loss": 1})
    flare.send(sent)

    assert received is not None
    assert received.params is None
    assert (sent.params, sent.optimizer_params, sent.metrics) == (None, None, {"loss": 1})
    assert engine.next_answer().optimizer_params is not None


def test_memory_is_free_before_the_script_comes_back() -> None:
    """Coming back may be a long wait for the turn: params are gone before it begins."""
    engine, seen = FakeEngine(), []
    sent = weights()
    engine.wait = lambda: seen.append(sent.params)

    @contextmanager
    def away() -> Any:
        yield
        seen.append(sent.params)

    with sit(Seat(engine, away), {}):
        flare.init()
        engine.give(weights())
        flare.receive()
        seen.clear()
        params = sent.params
        flare.send(sent)

    assert seen == [params, None]


def test_the_script_is_away_only_while_it_waits() -> None:
    """An answer that needs no waiting keeps the turn: to get it back could take as long as all others work."""
    engine, seen = FakeEngine(), []

    @contextmanager
    def away() -> Any:
        seen.append("away")
        yield
        seen.append("back")

    with sit(Seat(engine, away), {}):
        flare.init()
        for wait in (None, lambda: seen.append("waits")):
            engine.wait = wait
            engine.give(weights())
            flare.receive()
            seen.append("sends")
            flare.send(weights())

    assert seen == ["away", "back", "sends", "away", "back", "sends", "away", "waits", "back"]


def test_a_wait_that_fails_leaves_the_task_open(engine: FakeEngine) -> None:
    """What could not be delivered can be sent again; once the job has ended it is dropped instead."""

    def fail() -> None:
        raise FlarebusError("lost")

    engine.wait = fail
    flare.init()
    engine.give(weights())
    flare.receive()
    with pytest.raises(FlarebusError, match="lost"):
        flare.send(weights())
    engine.ended = "completed"
    flare.send(weights())

    assert not flare.is_running()


def test_keeping_the_cache_leaves_both_models_alone(engine: FakeEngine) -> None:
    """With clear_cache=False the models are as they were."""
    flare.init()
    engine.give(weights())
    received = flare.receive()
    sent = weights(2)
    params = sent.params
    flare.send(sent, clear_cache=False)

    assert received is not None
    assert received.params is not None
    assert sent.params is params


def test_failed_send_can_be_repeated(engine: FakeEngine) -> None:
    """An error on the way leaves the task open and the model whole."""
    flare.init()
    engine.give(weights())
    flare.receive()
    engine.refusal = Closed("no way")
    sent = weights(2)
    with pytest.raises(Closed):
        flare.send(sent)
    engine.refusal = None
    flare.send(sent)

    assert float(engine.next_answer().params["w"][0]) == 2


def test_scalars_of_libraries_become_numbers(engine: FakeEngine) -> None:
    """Metrics and meta travel as plain numbers, so that a server needs no library to read them."""
    import torch

    flare.init()
    engine.give(weights())
    flare.receive()
    flare.send(
        flare.FLModel(metrics={"a": np.float32(0.5), "b": torch.tensor(0.25), "c": "x"}, meta={"n": np.int64(3)})
    )
    answer = engine.next_answer()

    assert [(type(value), value) for value in (answer.metrics or {}).values()] == [
        (float, 0.5),
        (float, 0.25),
        (str, "x"),
    ]
    assert type(answer.meta["n"]) is int


def test_other_ranks_see_the_task_and_do_not_answer(engine: FakeEngine) -> None:
    """Every rank receives the same model; a send that is not rank 0's does nothing."""
    flare.init()
    other = flare.init(rank=1)
    engine.give(weights())

    assert flare.is_running(ctx=other)
    assert flare.receive(ctx=other) is flare.receive()
    flare.send(weights(), ctx=other)
    assert engine.answers.empty()
    flare.send(weights())
    assert not engine.answers.empty()


# --- tasks


@pytest.mark.parametrize(
    ("name", "expected"),
    [("train", (True, False, False)), ("validate", (False, True, False)), ("submit_model", (False, False, True))],
)
def test_task_predicates(engine: FakeEngine, name: str, expected: tuple[bool, ...]) -> None:
    """Exactly one of the predicates holds for a task, and the name can be asked for."""
    flare.init()
    engine.give(flare.FLModel(), name)
    assert flare.is_running()

    assert (flare.is_train(), flare.is_evaluate(), flare.is_submit_model()) == expected
    assert flare.get_task_name() == name


def test_submit_model_task_has_only_meta(engine: FakeEngine) -> None:
    """The wanted model is named in the meta; there are no params."""
    flare.init()
    engine.give(flare.FLModel(meta={"submit_model_name": "best"}), "submit_model", round=None)
    model = flare.receive()

    assert model is not None
    assert model.params is None
    assert model.meta == {"submit_model_name": "best", "job_id": "job-7", "site_name": "site-1"}


def test_configured_task_names_count(sit_down: Sit) -> None:
    """A job may call its tasks otherwise."""
    engine = sit_down(train_task_name="fit", eval_task_name="score")
    flare.init()
    engine.give(weights(), "fit")
    assert flare.is_running()

    assert flare.is_train()
    assert not flare.is_evaluate()


def test_task_name_needs_a_task(engine: FakeEngine) -> None:
    """Before the first task there is no name; after an answer the name of the last one stays."""
    flare.init()
    with pytest.raises(ClientApiError, match="no task yet"):
        flare.is_train()
    engine.give(weights())
    flare.receive()
    flare.send(weights())

    assert flare.is_train()


def test_clear_drops_the_task(engine: FakeEngine) -> None:
    """After clear the received model is free and the next receive is the next task."""
    flare.init()
    engine.give(weights(1))
    engine.give(weights(2))
    first = flare.receive()
    flare.clear()

    assert first is not None
    assert first.params is None
    with pytest.raises(ClientApiError, match="receive"):
        flare.send(weights())
    second = flare.receive()
    assert second is not None
    assert float(second.params["w"][0]) == 2


# --- log, config


def test_log_hands_over_key_value_and_kind(engine: FakeEngine) -> None:
    """A metric goes to the engine as a plain number with its extra arguments."""
    flare.init()
    flare.log("loss", np.float64(0.5), flare.AnalyticsDataType.SCALAR, global_step=np.int32(3))

    assert engine.logged == [("loss", 0.5, flare.AnalyticsDataType.SCALAR, {"global_step": 3})]
    assert type(engine.logged[0][1]) is float


@pytest.mark.parametrize(
    ("key", "kind", "name"), [("", "SCALAR", "key"), (3, "SCALAR", "key"), ("k", "X", "data_type")]
)
def test_log_refuses_wrong_arguments(engine: FakeEngine, key: Any, kind: Any, name: str) -> None:
    """A wrong argument is named."""
    flare.init()

    with pytest.raises(ConfigError, match=name):
        flare.log(key, 1.0, kind)


def test_config_is_a_copy(sit_down: Sit) -> None:
    """What a script does to the configuration stays with the script."""
    engine = sit_down(exchange_format="raw")
    flare.init()
    flare.get_config()["TASK_EXCHANGE"]["exchange_format"] = "x"

    assert engine.config["TASK_EXCHANGE"]["exchange_format"] == "raw"
    assert flare.get_job_id() == "job-7"


# --- threads


def test_thread_of_the_script_is_known_by_its_globals() -> None:
    """A thread that runs a function of a script belongs to that script, whoever else sits."""
    engines = [FakeEngine("a"), FakeEngine("b")]
    code = "import flarebus.client as flare\ndef work(): flare.log('x', 1, 'SCALAR')\nflare.init()\n"
    spaces: list[dict[str, Any]] = [{}, {}]
    with sit(Seat(engines[0]), spaces[0]):
        exec(code, spaces[0])
        with sit(Seat(engines[1]), spaces[1]):
            exec(code, spaces[1])
            thread = threading.Thread(target=spaces[0]["work"])
            thread.start()
            thread.join(LIMIT_S)

    assert (len(engines[0].logged), len(engines[1].logged)) == (1, 0)


def test_context_works_in_any_thread(engine: FakeEngine) -> None:
    """A thread that cannot be traced to the script uses the context it is given."""
    context = flare.init()
    thread = threading.Thread(target=flare.log, args=("x", 1, "SCALAR"), kwargs={"ctx": context})
    thread.start()
    thread.join(LIMIT_S)

    assert engine.logged


def test_two_threads_that_wait_see_one_task(engine: FakeEngine) -> None:
    """One thread fetches; the other gets the same model."""
    context = flare.init()
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(flare.receive(ctx=context))) for _ in range(2)]
    for thread in threads:
        thread.start()
    engine.waiting.get(timeout=LIMIT_S)
    engine.give(weights())
    for thread in threads:
        thread.join(LIMIT_S)

    assert got[0] is got[1] is not None


def test_task_cancelled_before_it_is_seen_is_passed_over(engine: FakeEngine) -> None:
    """A task whose round is closed by the time the script gets to see it is not worked on; the next one is."""
    flare.init()
    engine.cancelled.add(engine.give(weights(1)))
    engine.give(weights(2))

    assert flare.is_running()
    model = flare.receive()
    assert model is not None
    assert (model.params or {})["w"].tolist() == (weights(2).params or {})["w"].tolist()
    engine.cancelled.add(engine.give(weights(3)))
    flare.send(weights(2))
    assert flare.receive(timeout=0) is None


def test_task_that_is_being_answered_is_not_seen_again(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread sends, another one waits for the task after."""
    context = flare.init()
    engine.give(weights(1))
    engine.give(weights(2))
    flare.receive()
    asked, go_on, got = threading.Event(), threading.Event(), []
    answer = engine.answer

    def slow(*args: Any) -> None:
        asked.set()
        go_on.wait(LIMIT_S)
        answer(*args)

    monkeypatch.setattr(engine, "answer", slow)
    sender = threading.Thread(target=flare.send, args=(weights(),), kwargs={"ctx": context})
    receiver = threading.Thread(target=lambda: got.append(flare.receive(ctx=context)))
    sender.start()
    assert asked.wait(LIMIT_S)
    receiver.start()
    receiver.join(0.05)
    assert got == []
    go_on.set()
    sender.join(LIMIT_S)
    receiver.join(LIMIT_S)

    assert float(got[0].params["w"][0]) == 2


def test_thread_of_a_library_falls_back_and_the_host_does_not() -> None:
    """Whoever has the turn is meant by a thread that cannot be traced; the host's own threads mean nobody."""
    seat = Seat(FakeEngine())
    found: dict[str, Any] = {}
    set_fallback(lambda: seat)
    try:
        for name in ("library", "flarebus loop"):
            look = functools.partial(lambda key: found.update({key: seat_of_caller()}), name)
            thread = threading.Thread(target=look, name=name)
            thread.start()
            thread.join(LIMIT_S)

        assert found == {"library": seat, "flarebus loop": None}
        assert seat_of_caller() is None
    finally:
        set_fallback(None)


def test_calls_after_the_script_has_ended_are_refused() -> None:
    """A thread left behind learns that its script is over."""
    with sit(Seat(FakeEngine()), {}):
        context = flare.init()

    with pytest.raises(ClientApiError, match="has ended"):
        flare.is_running(ctx=context)


# --- memory, import


def test_memory_is_released_every_so_many_sends(sit_down: Sit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's setting counts sends; the environment overrides it."""
    released: list[bool] = []
    monkeypatch.setattr("flarebus.client.memory.release_memory", released.append)
    monkeypatch.setenv("FLAREBUS_CUDA_EMPTY_CACHE", "true")
    engine = sit_down(memory_gc_rounds=2)
    flare.init()
    for _ in range(5):
        engine.give(weights())
        flare.receive()
        flare.send(weights())

    assert released == [True, True]


@pytest.mark.parametrize("value", ["often", "-1", "1.5"])
def test_wrong_memory_setting_in_the_environment_is_named(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """A variable that is no number is an error at init, by its name."""
    monkeypatch.setenv("FLAREBUS_CLIENT_MEMORY_GC_ROUNDS", value)

    with pytest.raises(ConfigError, match="FLAREBUS_CLIENT_MEMORY_GC_ROUNDS"):
        flare.init()


@pytest.mark.parametrize("name", ["exchange_format", "server_expected_format", "transfer_type", "cuda_empty_cache"])
def test_wrong_configuration_is_named(sit_down: Sit, name: str) -> None:
    """A word that is not in the list is an error at init, by its name."""
    sit_down(**{name: "sideways"})

    with pytest.raises(ConfigError, match=name):
        flare.init()


def test_release_memory_runs() -> None:
    """Collecting and trimming work on this system."""
    from flarebus.client.memory import release_memory

    release_memory(cuda=True)


def test_import_stays_small() -> None:
    """Importing the Client API brings the standard library, NumPy, msgpack and ZeroMQ at most."""
    code = (
        "import sys; import flarebus.client; "
        "tops = {name.partition('.')[0] for name in sys.modules}; "
        "known = {'flarebus', 'numpy', 'msgpack', 'zmq'} | sys.stdlib_module_names; "
        "print(sorted(top for top in tops - known if not top.startswith(('_', 'sitecustomize'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)

    assert done.stdout.strip() == "[]"
