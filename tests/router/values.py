"""Values that tests of the router start from."""

from collections.abc import Sequence

from common.load import Load
from common.params import SamplingParams, StoppingParams
from router.request import Arrival, Request
from router.workers import Identity, Role, Worker, WorkerState


def request(
    request_id: str = "r",
    *,
    num_prompt_tokens: int = 4,
    prompt_token_ids: Sequence[int] | None = None,
    priority: int = 0,
    deadline_s: float = float("inf"),
    client: str = "test",
    cache_salt: str = "",
    **stopping: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids or list(range(num_prompt_tokens)),
        sampling=SamplingParams(),
        stopping=StoppingParams(**stopping),
        cache_salt=cache_salt,
        priority=priority,
        arrival=Arrival(client, received_s=0.0, deadline_s=deadline_s),
    )


def identity(**changes: object) -> Identity:
    given = Identity(
        instance_id="worker",
        boot_id="boot",
        model_id="tiny",
        model_fingerprint="fingerprint",
        protocol_version=1,
        context_length=2048,
        vocab_size=2048,
        block_size=16,
        num_total_blocks=100,
        max_num_seqs=64,
        eos_token_ids=(2,),
    )
    return given._replace(**changes)


def worker(
    who: Identity | None = None,
    *,
    role: Role = Role.DECODE,
    address: str = "worker:1",
    load: Load | None = None,
    wedged_after_s: float = 10.0,
    met: bool = True,
) -> Worker:
    """A serving worker, unless it has not been `met` yet."""
    who = who or identity()
    one = Worker(role, address, wedged_after_s=wedged_after_s)
    if met:
        one.meet(who, 0.0)
        one.hear(WorkerState.SERVING, load or Load(num_free_blocks=who.num_total_blocks), 0, 0.0)
    return one
