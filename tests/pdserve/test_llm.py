"""`LLM` as its users meet it: one of them for all of these tests, with the bundled model on the CPU."""

from __future__ import annotations

import signal
import threading

import pytest

from common.errors import InvalidArgument
from pdserve import LLM, Client, SamplingParams
from tests.support.device import TEST_DEVICE

PROMPTS = ["Return a list of", "The for statement is used to", "Raised when an operation"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def llm():
    keywords = {"local_prefill": "never", "decode_pipeline_profiling": True, "num_threads": 1, "num_blocks": 1024}
    if TEST_DEVICE == "cpu":
        # As on two GPUs, of which there are none.
        keywords |= {"enable_two_gpu_pd": True, "enable_decode_pipeline": True, "enforce_eager": True}
    with LLM(device=TEST_DEVICE, **keywords) as llm:
        yield llm


def test_outputs_come_in_the_order_of_the_prompts(llm):
    alone = [llm.generate([prompt], GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
    together = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.text for output in together] == [output.text for output in alone]
    assert [len(output.token_ids) for output in together] == [8, 8, 8]
    assert together[0]["text"] == together[0].text
    assert together[0]["token_ids"] == together[0].token_ids


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 1, 2)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.usage.completion_tokens for output in outputs] == [3, 1, 2]


def test_token_ids_and_single_prompts_are_prompts(llm):
    (output,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    assert output.usage.prompt_tokens == 3
    assert len(llm.generate("Return", GREEDY, use_tqdm=False)) == 1
    assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].token_ids == output.token_ids
    assert llm.generate([], GREEDY) == []


def test_conversations_go_through_the_models_template(llm):
    turns = [{"role": "user", "content": "Hi"}]
    (one,) = llm.chat(turns, GREEDY, use_tqdm=False)
    first, second = llm.chat([turns, turns], GREEDY, use_tqdm=False)
    assert one.token_ids == first.token_ids == second.token_ids
    assert one.usage.prompt_tokens > 2


def test_kv_goes_from_one_service_to_the_other(llm):
    (output,) = llm.generate("A prompt that nobody has sent yet", GREEDY, use_tqdm=False)
    assert output.path.kv_path == "REMOTE"
    assert output.path.prefill_worker != output.path.decode_worker


def test_the_bar_tells_prompts_and_tokens_a_second(llm, capsys):
    llm.generate(PROMPTS, GREEDY)
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "3/3" in stderr
    assert "prefill" in stderr
    assert "tok/s" in stderr


def test_the_pipelines_statistics_are_figures_and_lines(llm, capsys):
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    stats = llm.decode_runner.get_pipeline_statistics()
    llm.decode_runner.print_pipeline_statistics()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "Pipeline statistics"
    assert lines[:6] == [
        f"  Total tokens: {stats.total_tokens}",
        f"  Avg attention time: {stats.attention_ms:.2f} ms",
        f"  Avg FFN time: {stats.ffn_ms:.2f} ms",
        f"  Avg total time: {stats.total_ms:.2f} ms",
        f"  Attention SMs: {stats.attention_sm}",
        f"  FFN SMs: {stats.ffn_sm}",
    ]
    assert stats.total_tokens >= 3 * 7
    if TEST_DEVICE == "cpu":
        assert (stats.mode, stats.fallback_reason) == ("STATIC", "NO_GPU")


def test_a_prompt_that_cannot_work_is_named_and_the_rest_is_cancelled(llm):
    endless = SamplingParams(max_tokens=1500, ignore_eos=True)
    with pytest.raises(InvalidArgument, match="top_p") as caught:
        llm.generate(PROMPTS, [endless, endless, SamplingParams(top_p=2.0)], use_tqdm=False)
    assert caught.value.__notes__ == ["prompt 2 of 3, counted from 0"]
    wait_until_idle(llm)
    with pytest.raises(InvalidArgument, match="one for each of 3 prompts, got 2"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_ctrl_c_cancels_what_is_under_way_and_the_services_stay(llm):
    def interrupt() -> None:
        with Client(llm.router_address) as client:
            while not any(worker.num_running for worker in client.list_workers().workers):
                started.wait(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    started = threading.Event()
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 8, SamplingParams(max_tokens=1900, ignore_eos=True), use_tqdm=False)
    interrupting.join()
    wait_until_idle(llm)
    assert len(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == 3


def wait_until_idle(llm) -> None:
    """No worker works on anything; how the LLM would leave it if nobody had asked."""
    with Client(llm.router_address) as client:
        waiting = threading.Event()
        while any(worker.num_running or worker.num_waiting for worker in client.list_workers().workers):
            waiting.wait(0.01)
