"""The trainer's configuration: every key, what it means when it is missing, and the file it travels in."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flarebus.client.config import (
    ClientConfig,
    ConfigKey,
    ExchangeFormat,
    TransferType,
    from_file,
    write_config_to_file,
)
from flarebus.errors import ConfigError
from flarebus.job import kinds

TASK, METRICS = ConfigKey.TASK_EXCHANGE, ConfigKey.METRICS_EXCHANGE

EVERYTHING: dict[str, Any] = {
    "SITE_NAME": "site-1",
    "JOB_ID": "simulate_job",
    "TASK_EXCHANGE": {
        "train_with_eval": True,
        "exchange_format": "pytorch",
        "server_expected_format": "raw",
        "transfer_type": "DIFF",
        "train_task_name": "fit",
        "eval_task_name": "score",
        "submit_model_task_name": "give",
        "pipe_channel_name": "work",
        "pipe": {"CLASS_NAME": "my.module.Pipe", "ARG": {"root_url": "tcp://0:51893", "password": "secret-1"}},
        "HEARTBEAT_TIMEOUT": 90.0,
        "heartbeat_interval": 1.5,
        "memory_gc_rounds": 2,
        "cuda_empty_cache": True,
        "submit_result_timeout": 10.0,
        "max_resends": 7,
        "download_complete_timeout": 20.0,
        "launch_once": True,
    },
    "METRICS_EXCHANGE": {
        "pipe_channel_name": "numbers",
        "pipe": {"CLASS_NAME": "cell", "ARG": {"token": "secret-2"}},
        "HEARTBEAT_TIMEOUT": 30.0,
    },
    "log_config": "verbose",
    "auth_token": "secret-3",
    "connection": {"secret": "secret-4", "server": "public"},
}
GETTERS: list[tuple[str, Any, Any]] = [  # what, when the file is silent, when it says everything
    ("get_site_name", None, "site-1"),
    ("get_job_id", None, "simulate_job"),
    ("get_auth_token", None, "secret-3"),
    ("get_connection", None, {"secret": "secret-4", "server": "public"}),
    ("get_log_config", None, "verbose"),
    ("get_train_with_eval", False, True),
    ("get_exchange_format", ExchangeFormat.NUMPY, ExchangeFormat.PYTORCH),
    ("get_server_expected_format", ExchangeFormat.NUMPY, ExchangeFormat.RAW),
    ("get_transfer_type", TransferType.FULL, TransferType.DIFF),
    ("get_train_task", "train", "fit"),
    ("get_eval_task", "validate", "score"),
    ("get_submit_model_task", "submit_model", "give"),
    ("get_heartbeat_timeout", 60.0, 90.0),
    ("get_heartbeat_interval", 5.0, 1.5),
    ("get_memory_gc_rounds", 0, 2),
    ("get_cuda_empty_cache", False, True),
    ("get_submit_result_timeout", 300.0, 10.0),
    ("get_max_resends", 3, 7),
    ("get_download_complete_timeout", 1800.0, 20.0),
    ("get_launch_once", False, True),
]


@pytest.mark.parametrize(("getter", "default", "given"), GETTERS, ids=[name for name, _, _ in GETTERS])
def test_getter_has_its_default_and_what_was_given(getter: str, default: Any, given: Any) -> None:
    """Each getter answers for a missing key, a missing section, and for what the file says; types included."""
    for config, expected in ((None, default), ({TASK: {}, METRICS: {}}, default), (EVERYTHING, given)):
        found = getattr(ClientConfig(config), getter)()

        assert (found, type(found)) == (expected, type(expected))


def test_names_are_those_that_scripts_know() -> None:
    """The constants have the values that stand in files, and formats and transfer types are defined once."""
    assert (ConfigKey.TASK_EXCHANGE, ConfigKey.HEARTBEAT_TIMEOUT) == ("TASK_EXCHANGE", "HEARTBEAT_TIMEOUT")
    assert (ConfigKey.TASK_NAME, ConfigKey.CLASS_NAME, ConfigKey.ARG) == ("TASK_NAME", "CLASS_NAME", "ARG")
    assert {each.value for each in ExchangeFormat} == {"raw", "pytorch", "numpy", "keras_layer_weights"}
    assert (ExchangeFormat, TransferType) == (kinds.ExchangeFormat, kinds.TransferType)


def test_pipes_have_a_class_arguments_and_a_channel() -> None:
    """Each section has its own pipe; arguments are a copy."""
    config = ClientConfig(EVERYTHING)
    config.get_pipe_args(TASK)["root_url"] = "elsewhere"

    assert [config.get_pipe_channel_name(section) for section in (TASK, METRICS)] == ["work", "numbers"]
    assert [config.get_pipe_class(section) for section in (TASK, METRICS)] == ["my.module.Pipe", "cell"]
    assert config.get_pipe_args(TASK) == {"root_url": "tcp://0:51893", "password": "secret-1"}
    assert [ClientConfig().get_pipe_channel_name(section) for section in (TASK, METRICS)] == ["task", "metric"]
    assert ClientConfig({TASK: {"pipe": {"CLASS_NAME": "file"}}}).get_pipe_args(TASK) == {}


def test_missing_pipe_and_wrong_section_are_named() -> None:
    """There is no default pipe, and no third section."""
    with pytest.raises(ConfigError, match=r"METRICS_EXCHANGE.*no pipe"):
        ClientConfig({TASK: EVERYTHING[TASK]}).get_pipe_class(METRICS)
    with pytest.raises(ConfigError, match="did you mean 'TASK_EXCHANGE'"):
        ClientConfig(EVERYTHING).get_pipe_args("TASK_EXCHANG")


def test_heartbeat_timeout_of_metrics_counts_where_tasks_have_none() -> None:
    """The task section first, then the metrics section, then the default."""
    assert ClientConfig({METRICS: {"HEARTBEAT_TIMEOUT": 30}}).get_heartbeat_timeout() == 30.0
    assert (
        ClientConfig({TASK: {"HEARTBEAT_TIMEOUT": 20}, METRICS: {"HEARTBEAT_TIMEOUT": 30}}).get_heartbeat_timeout()
        == 20
    )


def test_no_limit_of_resends_and_less_than_none(caplog: pytest.LogCaptureFixture) -> None:
    """null is no limit; a negative number counts as 0 and is worth a warning."""
    assert ClientConfig({TASK: {"max_resends": None}}).get_max_resends() is None
    with caplog.at_level(logging.WARNING, "flarebus.client"):
        assert ClientConfig({TASK: {"max_resends": -3}}).get_max_resends() == 0
    assert "max_resends" in caplog.text


def test_empty_text_says_nothing() -> None:
    """An empty string where a word belongs is the same as a missing key."""
    section = dict.fromkeys(
        ("exchange_format", "server_expected_format", "transfer_type", "train_task_name", "pipe_channel_name"), ""
    )
    config = ClientConfig({TASK: section, "SITE_NAME": "", "auth_token": ""})

    assert (config.get_exchange_format(), config.get_transfer_type()) == (ExchangeFormat.NUMPY, TransferType.FULL)
    assert (config.get_train_task(), config.get_pipe_channel_name(TASK)) == ("train", "task")
    assert (config.get_site_name(), config.get_auth_token()) == (None, None)


@pytest.mark.parametrize(
    ("config", "parameter", "said"),
    [
        ({"SITENAME": "a"}, "config", "'SITENAME': unknown key; did you mean 'SITE_NAME'?"),
        ({"auth_tokens": "hidden"}, "config", "did you mean 'auth_token'?"),
        ({TASK: {"max_resend": 3}}, "config['TASK_EXCHANGE']", "did you mean 'max_resends'?"),
        ({METRICS: {"max_resends": 3}}, "config['METRICS_EXCHANGE']", "unknown key"),
        ({METRICS: {"pipe": {"CLASSNAME": "x"}}}, "config['METRICS_EXCHANGE']['pipe']", "did you mean 'CLASS_NAME'?"),
        ({TASK: {"pipe": {"ARG": {}}}}, "config['TASK_EXCHANGE']['pipe']", "'CLASS_NAME' is missing"),
        ({TASK: {"pipe": {"CLASS_NAME": "x", "ARG": "hidden"}}}, "config['TASK_EXCHANGE']['pipe']['ARG']", "an object"),
        ({TASK: {"pipe": {"CLASS_NAME": "a..b"}}}, "config['TASK_EXCHANGE']['pipe']['CLASS_NAME']", "name of a pipe"),
        ({TASK: []}, "config['TASK_EXCHANGE']", "a dict"),
        ({TASK: None}, "config['TASK_EXCHANGE']", "a dict"),
        (
            {TASK: {"exchange_format": "jax"}},
            "config['TASK_EXCHANGE']['exchange_format']",
            "numpy, pytorch, raw, keras",
        ),
        ({TASK: {"transfer_type": "full"}}, "config['TASK_EXCHANGE']['transfer_type']", "FULL, DIFF"),
        ({TASK: {"train_task_name": None}}, "config['TASK_EXCHANGE']['train_task_name']", "a string"),
        ({TASK: {"train_with_eval": 1}}, "config['TASK_EXCHANGE']['train_with_eval']", "True or False"),
        ({TASK: {"memory_gc_rounds": -1}}, "config['TASK_EXCHANGE']['memory_gc_rounds']", "whole number from 0"),
        ({TASK: {"max_resends": True}}, "config['TASK_EXCHANGE']['max_resends']", "a whole number"),
        ({TASK: {"submit_result_timeout": "5"}}, "config['TASK_EXCHANGE']['submit_result_timeout']", "above 0"),
        ({TASK: {"HEARTBEAT_TIMEOUT": math.nan}}, "config['TASK_EXCHANGE']['HEARTBEAT_TIMEOUT']", "finite"),
        ({TASK: {"heartbeat_interval": 60}}, "config['TASK_EXCHANGE']['heartbeat_interval']", "less than"),
        ({"SITE_NAME": 3}, "config['SITE_NAME']", "a string"),
        ({"log_config": 3}, "config['log_config']", "a string"),
        ({"auth_token": ["hidden"]}, "config['auth_token']", "<list>: a string"),
        ({"connection": "hidden"}, "config['connection']", "<str>: an object"),
        ({"connection": {"secret": b"hidden"}}, "config['connection']", "<dict>: not JSON"),
    ],
    ids=str,
)
def test_mistake_is_named_and_shows_no_secret(config: dict[str, Any], parameter: str, said: str) -> None:
    """A wrong key names the nearest known one, a wrong value its place; what may be secret is not repeated."""
    with pytest.raises(ConfigError) as caught:
        ClientConfig(config)

    assert (caught.value.parameter, said in str(caught.value)) == (parameter, True), str(caught.value)
    assert "hidden" not in str(caught.value)


def test_what_scripts_see_has_nothing_secret() -> None:
    """The public part has everything but the token, the connection, and what pipes are made with."""
    config = ClientConfig(EVERYTHING)

    shown = config.public()
    shown[TASK]["pipe"]["CLASS_NAME"] = "changed"

    assert "secret" not in json.dumps(shown)
    expected = {key: value for key, value in EVERYTHING.items() if key not in ("auth_token", "connection")}
    expected[TASK] = {**EVERYTHING[TASK], "pipe": {"CLASS_NAME": "my.module.Pipe"}}
    expected[METRICS] = {**EVERYTHING[METRICS], "pipe": {"CLASS_NAME": "cell"}}
    assert config.public() == expected
    assert ClientConfig(config.public()).get_pipe_class(TASK) == "my.module.Pipe"


def test_configuration_is_its_own() -> None:
    """What happens to the dict that came in, or to the one that went out, happens to them only."""
    given = json.loads(json.dumps(EVERYTHING))
    config = ClientConfig(given)
    given[TASK]["pipe"]["ARG"]["root_url"] = "elsewhere"
    config.get_config()[TASK]["max_resends"] = 99

    assert config.get_config() == EVERYTHING


def test_file_comes_back_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    """All keys survive, nothing is left beside the file, and the umask has no say."""
    path = tmp_path / "client_api_config.json"
    before = os.umask(0)
    try:
        ClientConfig(EVERYTHING).to_json(path)
    finally:
        os.umask(before)

    assert from_file(path).get_config() == EVERYTHING
    assert from_file(str(path)).get_config() == EVERYTHING
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_writing_replaces_a_file_that_others_could_read(tmp_path: Path) -> None:
    """The secret goes into a new file, never into one that somebody may have open."""
    path = tmp_path / "c.json"
    path.write_text("old")
    with path.open() as opened:
        ClientConfig(EVERYTHING).to_json(path)

        assert opened.read() == "old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new file cannot take its place, the old one is whole and nothing lies beside it."""
    path = tmp_path / "c.json"
    ClientConfig({"JOB_ID": "old"}).to_json(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        ClientConfig({"JOB_ID": "new"}).to_json(path)

    assert from_file(path).get_job_id() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    """A file that cannot be written is a mistake with its path."""
    with pytest.raises(ConfigError, match=r"nowhere.*cannot be written: No such file"):
        ClientConfig().to_json(tmp_path / "nowhere" / "c.json")


def test_update_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    """Top-level keys are replaced one by one; a mistake leaves the file as it was."""
    path = tmp_path / "c.json"
    write_config_to_file({"JOB_ID": "one", TASK: {"max_resends": 1}}, path)
    write_config_to_file({"SITE_NAME": "a", TASK: {"launch_once": True}}, str(path))
    with pytest.raises(ConfigError, match="did you mean 'JOB_ID'"):
        write_config_to_file({"JOBID": "two"}, path)

    assert from_file(path).get_config() == {"JOB_ID": "one", "SITE_NAME": "a", TASK: {"launch_once": True}}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o644, 0o610])
def test_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """A file that anybody else may read or write is not used; the error says what to do."""
    path = tmp_path / "c.json"
    ClientConfig(EVERYTHING).to_json(path)
    path.chmod(mode)

    with pytest.raises(ConfigError, match="chmod 600") as caught:
        from_file(path)
    assert str(path) in str(caught.value)
    assert "secret-" not in str(caught.value)


def test_file_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another user wrote is not used, however its mode looks."""
    path = tmp_path / "c.json"
    ClientConfig(EVERYTHING).to_json(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)

    with pytest.raises(ConfigError, match=r"not to you.*chmod 600"):
        from_file(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(mode=0o700), "is no file"),
        (lambda path: os.mkfifo(path, 0o600), "is no file"),
        (lambda path: _private(path, b""), "not JSON, or not all of it"),
        (lambda path: _private(path, json.dumps(EVERYTHING).encode()[:-20]), "not JSON, or not all of it"),
        (lambda path: _private(path, b"[" * 100_000), "not JSON"),
        (lambda path: _private(path, b"\xff\xfe"), "no UTF-8"),
        (lambda path: _private(path, b"[]"), "a JSON object, not list"),
        (lambda path: _private(path, b" " * (2**20 + 1)), "too long"),
        (lambda path: _private(path, b'{"auth_toke": "secret-9"}'), "did you mean 'auth_token'"),
    ],
    ids=["missing", "folder", "fifo", "empty", "truncated", "deep", "binary", "list", "long", "unknown key"],
)
def test_file_that_is_no_configuration_is_refused(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    """Whatever is wrong with a file is said with its path, without its content."""
    path = tmp_path / "c.json"
    make(path)

    with pytest.raises(ConfigError) as caught:
        from_file(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "secret-" not in str(caught.value)


def _private(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)


def test_import_needs_the_standard_library_only() -> None:
    """Reading a configuration takes neither NumPy nor ZeroMQ nor msgpack."""
    code = (
        "import sys; import flarebus.client.config; "
        "print({name.partition('.')[0] for name in sys.modules} & {'numpy', 'zmq', 'msgpack', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "set()"
