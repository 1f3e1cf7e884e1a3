from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from common.config import ConfigError, DecodeConfig, PrefillConfig, RouterConfig, load

ALL = [RouterConfig, PrefillConfig, DecodeConfig]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("cls", ALL)
def test_every_default_is_valid_and_every_field_is_documented(cls):
    config = load(cls, [])
    assert config == cls()
    assert all(field.metadata["setting"].help for field in dataclasses.fields(config))


def test_the_three_services_find_one_another_by_default():
    router, prefill, decode = RouterConfig(), PrefillConfig(), DecodeConfig()
    assert (prefill.listen,) == router.prefill
    assert (decode.listen,) == router.decode
    assert len({config.metrics_listen for config in (router, prefill, decode)}) == 3


def test_the_bundled_model_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(RouterConfig().model) == REPOSITORY / "models" / "tiny"
    assert RouterConfig().model_id == "tiny"


@pytest.mark.parametrize("cls", ALL)
def test_a_config_cannot_be_changed(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().listen = "127.0.0.1:1"


def test_the_file_stands_over_the_defaults_and_flags_over_the_file(file):
    path = file('max_num_seqs = 7\ndrain_s = 5\ndeterministic = true\ndevice = "cpu"\n')
    config = load(DecodeConfig, ["--config", path, "--max-num-seqs", "9", "--no-deterministic"])
    assert (config.max_num_seqs, config.drain_s, config.deterministic, config.device) == (9, 5, False, "cpu")


def test_a_repeated_flag_makes_the_whole_list(file):
    path = file('prefill = ["a:1"]\ndecode = ["b:1", "b:2"]\n')
    config = load(RouterConfig, ["--config", path, "--prefill", "c:1", "--prefill", "[::1]:2"])
    assert config.prefill == ("c:1", "[::1]:2")
    assert config.decode == ("b:1", "b:2")


def test_an_instance_is_named_for_its_role_host_and_port():
    assert load(PrefillConfig, ["--listen", "0.0.0.0:7777"]).instance_id.startswith("prefill-")
    assert load(PrefillConfig, ["--listen", "0.0.0.0:7777"]).instance_id.endswith("-7777")
    assert load(DecodeConfig, ["--instance-id", "d0"]).instance_id == "d0"


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (RouterConfig, ["--listne", "x:1"], "unknown argument '--listne'; did you mean '--listen'?"),
        (RouterConfig, ["--list", "x:1"], "unknown argument '--list'; did you mean '--listen'?"),
        (RouterConfig, ["extra"], "unknown argument 'extra'"),
        (RouterConfig, ["--listen"], "argument --listen: expected one argument"),
        (PrefillConfig, ["--max-num-seqs", "many"], "max_num_seqs='many': expected a whole number"),
        (PrefillConfig, ["--max-num-seqs", "0"], "max_num_seqs=0: expected at least 1"),
        (PrefillConfig, ["--block-size", "512"], "block_size=512: expected at least 1 and at most 256"),
        (PrefillConfig, ["--kv-cache-gib", "0"], "kv_cache_gib=0.0: expected more than 0"),
        (PrefillConfig, ["--drain-s", "nan"], "drain_s=nan: expected at least 0"),
        (PrefillConfig, ["--dtype", "int8"], "dtype='int8': expected one of auto, float32, bfloat16, float16"),
        (PrefillConfig, ["--device", "gpu"], "device='gpu': expected auto, cpu, cuda or cuda:N"),
        (RouterConfig, ["--listen", "50051"], "listen='50051': the form is HOST:PORT"),
        (RouterConfig, ["--listen", ""], "listen='': the form is HOST:PORT"),
        (RouterConfig, ["--listen", "::1:50051"], "listen='::1:50051': an IPv6 address stands in brackets"),
        (RouterConfig, ["--listen", "[::g]:50051"], "::g is not an IPv6 address"),
        (RouterConfig, ["--listen", "h:65536"], "the port is a number from 0 to 65535"),
        (RouterConfig, ["--decode", "http://h:1"], "without scheme or path"),
        (RouterConfig, ["--decode", "h:0"], "decode='h:0': port 0 cannot be dialled"),
        (RouterConfig, ["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file or directory"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_was_expected(cls, arguments, message):
    with pytest.raises(ConfigError) as caught:
        load(cls, arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq = 4", "unknown key 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ("[decode]\nseed = 1", "unknown key 'decode'; did you mean"),
        ('max_num_seqs = "4"', "max_num_seqs='4': expected a whole number"),
        ("max_num_seqs = true", "max_num_seqs=True: expected a whole number"),
        ("deterministic = 1", "deterministic=1: expected true or false"),
        ("device = 0", "device=0: expected a string"),
        ("max_num_seqs = ", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_with_what_was_expected(file, text, message):
    with pytest.raises(ConfigError) as caught:
        load(DecodeConfig, ["--config", file(text)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("prefill = 'a:1'", "expected a list of strings"), ("prefill = []", "at least one value")]
)
def test_a_wrong_list_is_refused(file, text, message):
    with pytest.raises(ConfigError, match=message):
        load(RouterConfig, ["--config", file(text)])


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:50051", "decode.pdserve.svc:50053", "[fe80::1%eth0]:1"])
def test_an_address_may_be_ipv4_ipv6_or_a_name(text):
    assert load(RouterConfig, ["--listen", text]).listen == text


@pytest.mark.parametrize("cls", ALL)
def test_help_lists_every_setting_with_its_default(cls, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(cls, ["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(cls):
        assert "--" + field.name.replace("_", "-") in shown
