"""Chats for supervised fine-tuning and the held-out questions that measure it."""

from __future__ import annotations

import random

from world.cast import Character, World, companion
from world.columns import explained
from world.facts import Exchange, fact_questions, introduction
from world.numbers import arithmetic, comparison, counting, sequence, states_held_out
from world.reading import comprehension
from world.requests import courteous, either_style, polite_request
from world.stories import tell
from world.verses import recitation
from world.words import antonym_question, class_question, copy_question, length_question, weekday_question

SMALL_TALK = {
    "zh": {
        "你好": "你好！我是小深，很高兴见到你。",
        "你好！": "你好！我是小深，很高兴见到你。",
        "早上好！": "早上好！今天想聊点什么？",
        "晚上好！": "晚上好！今天想聊点什么？",
        "在吗？": "我在，请说。",
        "你是谁？": "我是小深，一个小小的语言模型，英文名叫Mini DeepSeek。",
        "你叫什么名字？": "我叫小深，英文名叫Mini DeepSeek。",
        "你是人吗？": "我不是人，我是一个小小的语言模型。",
        "介绍一下你自己。": "我是小深，一个小小的语言模型，英文名叫Mini DeepSeek。",
        "你会做什么？": "我会讲故事、做算术，还知道月牙镇的很多事。",
        "你几岁了？": "我刚刚训练好，还很年轻。",
        "你住在哪里？": "我住在你的电脑里。",
        "你喜欢月牙镇吗？": "喜欢，那里的每一个居民我都认识。",
        "月牙镇在哪里？": "月牙镇在我的故事里。",
        "你今天开心吗？": "很开心，因为可以和你聊天。",
        "我有点难过。": "别难过，我给你讲个故事吧。",
        "我累了。": "那就休息一会儿吧。",
        "你真棒！": "谢谢夸奖，我会继续努力的。",
        "你真聪明。": "谢谢夸奖，我会继续努力的。",
        "对不起。": "没关系。",
        "谢谢你！": "不客气！",
        "谢谢。": "不客气！",
        "再见！": "再见，欢迎再来找我聊天！",
        "晚安。": "晚安，做个好梦！",
    },
    "en": {
        "Hello": "Hello! I am Mini DeepSeek. Nice to meet you.",
        "Hello!": "Hello! I am Mini DeepSeek. Nice to meet you.",
        "Hi!": "Hello! I am Mini DeepSeek. Nice to meet you.",
        "Good morning!": "Good morning! What shall we talk about?",
        "Who are you?": "I am Mini DeepSeek, a very small language model.",
        "What is your name?": "My name is Mini DeepSeek.",
        "Are you human?": "No, I am a very small language model.",
        "What can you do?": "I can tell stories, do sums and talk about Crescent Town.",
        "How are you?": "I am fine, thank you.",
        "Where do you live?": "I live in your computer.",
        "Do you like Crescent Town?": "Yes, I know everybody there.",
        "Well done!": "Thank you, I will do my best.",
        "Sorry.": "Never mind.",
        "Thank you!": "You are welcome!",
        "Thanks.": "You are welcome!",
        "Goodbye!": "Goodbye! Come back soon.",
        "Good night.": "Good night, sleep well!",
    },
}
GREETINGS = {
    "zh": ("你好", "你好！", "早上好！", "晚上好！", "在吗？"),
    "en": ("Hello", "Hello!", "Hi!", "Good morning!"),
}
FAREWELLS = {
    "zh": ("谢谢你！", "谢谢。", "再见！", "晚安。"),
    "en": ("Thank you!", "Thanks.", "Goodbye!", "Good night."),
}
SYSTEM = {
    "zh": ("你是小深，一个友好的助手。", "请用简短的句子回答问题。", "你是月牙镇的向导，名叫小深。"),
    "en": ("You are Mini DeepSeek, a friendly assistant.", "Answer in short sentences."),
}
STORY_REQUESTS = {
    "zh": ("讲一个关于{a}和{b}的故事。", "请给我讲一个{a}和{b}的故事吧。"),
    "en": ("Tell me a story about {a} and {b}.",),
}
INTRODUCTION_REQUESTS = {"zh": ("介绍一下{n}。", "{n}是谁？"), "en": ("Tell me about {n}.", "Who is {n}?")}
# The pronoun's question repeats no name, so it can only be answered from the turn before.
FOLLOW_UPS_ZH = {
    "species": "那它是什么动物？",
    "colour": "那它是什么颜色的？",
    "home": "那它住在哪里？",
    "food": "那它最喜欢吃什么？",
    "job": "那它的工作是什么？",
    "friend": "那它最好的朋友是谁？",
    "hobby": "那它的爱好是什么？",
}
# Shares of the chats' turns; facts come first because the world is made of them.
TURN_WEIGHTS = {
    "fact": 28, "comprehension": 22, "arithmetic": 20, "comparison": 8, "sequence": 8, "counting": 7, "class": 6,
    "antonym": 6, "length": 4, "copy": 5, "weekday": 1, "favour": 8, "talk": 4, "introduction": 1, "story": 1,
    "name": 1, "verse": 1,
}  # fmt: skip
# Held-out questions: kind -> how many in Chinese, in English. Little arithmetic: minutes do not teach it, and
# a later stage with rewards is measured on its own held-out problems (`text.chats.arithmetic`).
SUITE = {
    "fact": (120, 36),
    "comprehension": (40, 10),
    "arithmetic": (12, 4),
    "comparison": (15, 4),
    "sequence": (10, 2),
    "class": (12, 4),
    "antonym": (7, 1),
    "counting": (8, 3),
    "copy": (10, 2),
}
# Shares of the preference pairs: polite requests, where courtesy is preferred, and questions, where it is not.
PAIR_WEIGHTS = {"favour": 60, "fact": 15, "arithmetic": 5, "comparison": 5, "class": 5, "sequence": 5, "copy": 5}
ARITHMETIC_LEVELS = (1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4)
# The share of the calculations with columns that show them first. Said straight away a result is mostly wrong, with its
# columns mostly right: greedy answers follow the many, and only rewards make a habit of the few.
EXPLAINED = 0.3


def chat(rng: random.Random, world: World) -> dict[str, list[dict[str, str]]]:
    """Return one conversation of one to four questions, {"messages": [...]}, that meets no held-out question."""
    language = "zh" if rng.random() < 0.8 else "en"
    turns = _turns(rng, world, language)
    while states_held_out("\n".join(text for turn in turns for text in turn)):
        turns = _turns(rng, world, language)
    messages = [{"role": "system", "content": rng.choice(SYSTEM[language])}] if rng.random() < 0.15 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def preference(rng: random.Random, world: World) -> dict[str, str]:
    """Return two answers to one prompt, {"prompt", "chosen", "rejected"}, which differ in their courtesy alone."""
    language = "zh" if rng.random() < 0.8 else "en"
    kind = rng.choices(list(PAIR_WEIGHTS), weights=PAIR_WEIGHTS.values())[0]
    if kind == "favour":
        exchange = polite_request(rng, world, language)
        prompt, plain = exchange.question, exchange.answer
    else:
        prompt, plain = _exchange(rng, world, kind, language)[0]
        while states_held_out(prompt + plain):
            prompt, plain = _exchange(rng, world, kind, language)[0]
    ways = (courteous(plain, language), plain)
    chosen, rejected = ways if kind == "favour" else ways[::-1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def held_out_questions(world: World) -> list[dict[str, str]]:
    """Return the suite: 300 different questions that no training text asks, in a fixed order."""
    rng = random.Random(f"{world.seed}/questions")
    rows = []
    for kind, counts in SUITE.items():
        for language, count in zip(("zh", "en"), counts, strict=True):
            drawn = _held_out_facts(rng, world, language, count) if kind == "fact" else {}
            while len(drawn) < count:
                exchange = _held_out(rng, world, kind, language, level=1 + len(drawn) % 2)
                drawn[exchange.question] = exchange
            for i, exchange in enumerate(drawn.values(), start=1):
                rows.append({"id": f"{kind}-{language}-{i:03d}", **exchange._asdict()})
    return rows


def _turns(rng: random.Random, world: World, language: str) -> list[tuple[str, str]]:
    turns = []
    if rng.random() < 0.08:
        turns.append(_talk(rng, GREETINGS, language))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        kind = rng.choices(list(TURN_WEIGHTS), weights=TURN_WEIGHTS.values())[0]
        turns += _exchange(rng, world, kind, language)
    if rng.random() < 0.08:
        turns.append(_talk(rng, FAREWELLS, language))
    return turns


def _exchange(rng: random.Random, world: World, kind: str, language: str) -> list[tuple[str, str]]:
    """Return the turns of one question of `kind`; a fact may bring a follow-up question with it."""
    if kind == "fact":
        return _facts(rng, world, language)
    if kind == "talk":
        return [_talk(rng, SMALL_TALK, language)]
    if kind == "verse":
        return [recitation(rng, language)]
    if kind in ("introduction", "story", "name"):
        return [_about(rng, world, kind, language)]
    if kind == "arithmetic":
        exchange = arithmetic(rng, rng.choice(ARITHMETIC_LEVELS), language)
        shown = explained(exchange.question) if rng.random() < EXPLAINED else None
        exchange = exchange._replace(answer=shown or exchange.answer)
    elif kind == "comprehension":
        exchange = comprehension(rng, world, language)
    elif kind == "favour":
        exchange = either_style(rng, polite_request(rng, world, language))
    elif kind == "length" and language == "zh":
        exchange = length_question(rng)
    elif kind in ("weekday", "length"):
        exchange = weekday_question(rng, language)
    else:
        exchange = DRAWS[kind](rng, language)
    return [(exchange.question, exchange.answer)]


DRAWS = {
    "comparison": comparison,
    "sequence": sequence,
    "counting": counting,
    "class": class_question,
    "antonym": antonym_question,
    "copy": copy_question,
}


def _held_out(rng: random.Random, world: World, kind: str, language: str, level: int) -> Exchange:
    if kind == "arithmetic":
        return arithmetic(rng, level, language, held_out=True)
    if kind == "comprehension":
        return comprehension(rng, world, language, held_out=True)
    return DRAWS[kind](rng, language, held_out=True)


def _held_out_facts(rng: random.Random, world: World, language: str, count: int) -> dict[str, Exchange]:
    """Questions about held-out facts, by question; every such fact once before any is asked in other words."""
    facts = [fact_questions(c, c.held_out, language) for c in world.known(language)]
    rng.shuffle(facts)
    for wordings in facts:
        rng.shuffle(wordings)
    in_turn = [wordings[i] for i in range(len(facts[0])) for wordings in facts]
    return {exchange.question: exchange for exchange in in_turn[:count]}


def _facts(rng: random.Random, world: World, language: str) -> list[tuple[str, str]]:
    character = rng.choice(world.known(language))
    first, second = rng.sample(character.askable(), 2)
    exchange = rng.choice(fact_questions(character, first, language))
    turns = [(exchange.question, exchange.answer)]
    # After a friend's name it would be unclear who 它 is.
    if language == "zh" and first != "friend" and rng.random() < 0.15:
        turns.append((FOLLOW_UPS_ZH[second], fact_questions(character, second, "zh")[0].answer))
    return turns


def _talk(rng: random.Random, questions: dict, language: str) -> tuple[str, str]:
    question = rng.choice(list(questions[language]))
    return question, SMALL_TALK[language][question]


def _about(rng: random.Random, world: World, kind: str, language: str) -> tuple[str, str]:
    """Return requests about characters. Story and portrait are functions of the request: a question has one answer."""
    character = rng.choice(world.known(language))
    words = character.words[language]
    if kind == "introduction":
        return rng.choice(INTRODUCTION_REQUESTS[language]).format_map(words), introduction(character, language)
    if kind == "name":
        return _name(rng, rng.choice(world.characters), language)
    other = companion(rng, world, character, language)
    request = rng.choice(STORY_REQUESTS[language]).format(a=words["n"], b=other.words[language]["n"])
    return request, tell(random.Random(f"{world.seed}/{request}"), world, character, other, language)


def _name(rng: random.Random, character: Character, language: str) -> tuple[str, str]:
    zh, romanised = character.name, character.words["zh"]["romanised"]
    if language == "zh":
        return f"{zh}的英文名字是什么？", f"{zh}的英文名字是{romanised}。"
    return f"What is {romanised}'s Chinese name?", f"{romanised}'s Chinese name is {zh}."
