"""The settings of `flowrl-mega eval`. Where a training run has the same setting, it has the same name here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from flowrl_mega.config import ConfigError, DataSettings, ParallelSettings, RewardSettings
from flowrl_mega.config_rollout import RolloutSettings, SyncSettings, key_faults, server_faults
from flowrl_mega.settings import Needs, PathText, Settings, refuse_unread


class EvalModel(Settings):
    path: PathText | None = Field(
        None,
        description="Hugging Face folder, or a Megatron checkpoint of any layout; of engine chat: null, the server "
        "has its own",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, else fp32")
    name: str | None = Field(None, description="engine chat: which of the server's models; null: the first it lists")


class EvalRollout(Settings):
    """How answers are written; the defaults are those of the paper's evaluation."""

    engine: Literal["embedded", "sglang", "chat"] = Field(
        "embedded", description="in these processes, by SGLang servers, or by any server of OpenAI's chat protocol"
    )
    max_tokens: int = Field(8192, ge=1, description="longest answer, the end token included")
    temperature: float = Field(0.6, ge=0, description="0: greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, description="0: off")
    servers: Annotated[int, Field(ge=1)] | list[str] = Field(1, description="how many to start, or the URLs of others'")
    python: PathText | None = Field(None, description="interpreter that has sglang; null: this one")
    server_args: dict[str, Any] = Field(default_factory=dict, description="SGLang's own flags, passed on")
    api_key_file: PathText | None = Field(None, description="file with the key that the servers ask for")
    concurrency: int = Field(512, ge=1, description="answers under way at a server")
    request_timeout_s: float = Field(7200.0, gt=0, description="an answer that takes longer ends the evaluation")
    hang_s: float = Field(60.0, gt=0, description="a server silent for so long is asked whether it lives")
    start_timeout_s: float = Field(900.0, gt=0, description="for servers to be ready")

    def of_servers(self) -> RolloutSettings:
        """The same for whoever starts servers and sends them prompts. They keep the weights that they start with."""
        shared = self.model_dump(exclude={"engine", "temperature"})
        return RolloutSettings(engine="sglang", sync=SyncSettings(transfer="disk"), **shared)


class JudgeSettings(Settings):
    """A language model that says how varied a problem's attempts are, by the paper's protocol."""

    url: str = Field(description="a server of OpenAI's chat protocol")
    model: str | None = Field(None, description="which of its models; null: the first it lists")
    api_key_file: PathText | None = Field(None, description="file with the key that it asks for")
    concurrency: int = Field(8, ge=1, description="problems under way")
    max_tokens: int = Field(512, ge=1, description="of its answer, thoughts included")
    timeout_s: float = Field(300.0, gt=0, description="for one answer")


class EvalReward(RewardSettings):
    """As in training; by default each row's kind says what grades its answers."""

    function: PathText = Field(
        "flowrl_mega.rewards.by_kind:score", description="module:function or file.py:function, as in training"
    )


class EvalConfig(Settings):
    run_dir: PathText = Field(description="results: answers/, samples.jsonl, scores.json, scores.md; goes on there")
    benchmarks: list[str] = Field(
        min_length=1,
        description="names of the table in docs/evaluation.md, reasoning_gym:TASK, or JSON lines files like data.path",
    )
    data: PathText | None = Field(None, description="folder with NAME.jsonl of each benchmark; null: from the hub")
    k: int = Field(16, ge=1, description="answers a problem")
    problems: int | None = Field(None, ge=1, description="only the first so many of each benchmark; null: all")
    seed: int = Field(0, ge=0, description="rules sampling")
    chat_template: bool | None = Field(None, description="null: where the model's tokenizer has one")
    template_date: date = Field(
        DataSettings.model_fields["template_date"].default,
        description=DataSettings.model_fields["template_date"].description,
    )
    model: EvalModel = EvalModel()
    parallel: ParallelSettings = Field(ParallelSettings(), description="engine embedded: how the model is shared out")
    rollout: EvalRollout = EvalRollout()
    reward: EvalReward = EvalReward()
    diversity: Literal["fast", "all"] = Field(
        "fast",
        description="all: also the Vendi score and self-BLEU (needs flowrl-mega[eval]); minutes for long answers",
    )
    embeddings: PathText | None = Field(
        None,
        description="model of sentence-transformers, a folder or a name of the hub: also what differs in meaning "
        "(needs flowrl-mega[embeddings])",
    )
    judge: JudgeSettings | None = Field(None, description="null: none; {url: ..}: a judge of diversity")


SERVERS = "rollout.servers rollout.concurrency rollout.request_timeout_s rollout.api_key_file"
OWN_SERVERS = "rollout.python rollout.server_args rollout.hang_s rollout.start_timeout_s"
NEEDS = (
    Needs(SERVERS, "rollout.engine=sglang or chat", lambda c: c.rollout.engine != "embedded"),
    Needs(OWN_SERVERS, "rollout.engine=sglang", lambda c: c.rollout.engine == "sglang"),
    Needs("parallel", "rollout.engine=embedded", lambda c: c.rollout.engine == "embedded"),
    Needs("model.name", "rollout.engine=chat", lambda c: c.rollout.engine == "chat"),
    Needs("model.path model.dtype", "rollout.engine=embedded or sglang", lambda c: c.rollout.engine != "chat"),
    Needs(
        "chat_template template_date",
        "rollout.engine=embedded or sglang (a chat server applies its own)",
        lambda c: c.rollout.engine != "chat",
    ),
)


def check_evaluation(config: EvalConfig) -> None:
    """Raises ConfigError for settings that contradict each other, or that nothing reads."""
    if faults := list(_faults(config)):
        raise ConfigError("\n".join(faults))
    refuse_unread(config, NEEDS)


def _faults(config: EvalConfig) -> Iterator[str]:
    rollout = config.rollout
    if config.model.path is None and rollout.engine != "chat":
        yield (
            "model.path: missing; give a Hugging Face folder or a Megatron checkpoint, also for servers that run "
            "already: prompts are made with its tokenizer"
        )
    if twice := [name for name in dict.fromkeys(config.benchmarks) if config.benchmarks.count(name) > 1]:
        yield f"benchmarks: {twice[0]!r} is there twice; give each once"
    if rollout.engine == "chat" and not isinstance(rollout.servers, list):
        yield f"rollout.servers = {rollout.servers}: chat servers are not started here; give their URLs"
    if rollout.engine == "chat" and rollout.top_k:
        yield f"rollout.top_k = {rollout.top_k}: is not in OpenAI's protocol; leave it out"
    yield from server_faults(rollout.servers, rollout.api_key_file)
    if config.judge is not None:
        yield from key_faults(config.judge.api_key_file, "judge.api_key_file")
        if not config.judge.url.startswith(("http://", "https://")):
            yield f"judge.url = {config.judge.url!r}: is no URL; write it as http://HOST:PORT"
        if config.k < 2:
            yield f"judge: k = {config.k}: what differs can only be judged of several attempts; take k of at least 2"
    if config.reward.overlong is not None:
        yield "reward.overlong: a penalty of training; leave it out"
