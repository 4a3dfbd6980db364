"""The bodies of requests, as OpenAI's API has them, with vLLM's further sampling fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model.decoding.sampling import Sampling

MOST_PROMPTS = 512
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
NEUTRAL = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "audio": (),
    "response_format": ({"type": "text"},), "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],),
}  # fmt: skip
"""Fields that clients send along: taken where they change nothing, refused by name where they would."""


class StreamOptions(BaseModel):
    include_usage: bool = False


class SampledRequest(BaseModel):
    """What chats and completions have in common. Fields that mean nothing here, such as `user`, are passed over."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow")

    model: str
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list, max_length=16)
    n: int = Field(1, ge=1, le=64)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    inspect: bool = False

    @model_validator(mode="before")
    @classmethod
    def given(cls, body: Any) -> Any:
        """Leave out fields that are null."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("a text to stop at is empty")
        return stop

    @property
    def refused(self) -> str:
        """Return the name of a field that asks for what this server cannot do; empty where there is none."""
        extra = self.model_extra or {}
        return next((name for name, values in NEUTRAL.items() if name in extra and extra[name] not in values), "")

    @property
    def sampling(self) -> Sampling:
        top_k = max(self.top_k, 0)
        return Sampling(self.repetition_penalty, self.temperature, top_k, self.top_p, self.min_p)


class ChatRequest(SampledRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["auto", "none"] = "auto"

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(SampledRequest):
    """POST /v1/completions."""

    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: str = ""

    @field_validator("prompt")
    @classmethod
    def some(cls, prompt: str | list) -> str | list:
        if isinstance(prompt, list) and not prompt:
            raise ValueError("names no prompt")
        if isinstance(prompt, list) and not isinstance(prompt[0], int) and len(prompt) > MOST_PROMPTS:
            raise ValueError(f"{len(prompt)} prompts in one request; send at most {MOST_PROMPTS}")
        return prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt

    @property
    def limit(self) -> int:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text or, with `messages`, a conversation."""

    model: str = ""
    prompt: str = ""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    add_special_tokens: bool = False
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model: str = ""
    tokens: list[Annotated[int, Field(ge=0)]]
