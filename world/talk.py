"""What the characters say and write about themselves and others: conversations, letters, diaries, riddles."""

from __future__ import annotations

import random

from world.cast import ATTRIBUTES, Character, Thing, World, companion, roles
from world.facts import canonical_statement, clauses_zh, statement
from world.grammar import joined, sentences


def conversation(rng: random.Random, world: World, language: str) -> str:
    """Return a script of two characters who meet and ask about each other; held-out facts are never asked for."""
    a, b = rng.sample(world.known(language), 2)
    colon, said = "：" if language == "zh" else ": ", sentences("talk")
    name_a, name_b = (c.words[language]["n"] for c in (a, b))
    lines = [name_a + colon + rng.choice(said["greetings"][language]).format_map(a.words[language])]
    stated = rng.choice(ATTRIBUTES)
    greeting = rng.choice(said["greetings"][language]).format_map(b.words[language])
    lines.append(name_b + colon + greeting + _self(b, stated, language))
    for speaker, asker in ((a, name_b), (b, name_a)):
        open_ones = [attribute for attribute in speaker.askable() if attribute != stated]
        for attribute in rng.sample(open_ones, rng.randint(1, 2)):
            lines.append(asker + colon + rng.choice(said["asked"][language][attribute]))
            lines.append(speaker.words[language]["n"] + colon + _self(speaker, attribute, language).strip())
    farewell, place = rng.choice(said["farewells"][language]), rng.choice(sentences("cast")["places"])[0]
    return "\n".join([*lines, name_a + colon + farewell.format(place=place)])


def gossip(rng: random.Random, world: World, language: str) -> str:
    """Return what two characters say about a third one."""
    characters, said = rng.sample(world.known(language), 3), sentences("talk")["gossip"][language]
    a, b, c = (character.words[language]["n"] for character in characters)
    facts = [statement(rng, characters[2], attribute, language) for attribute in rng.sample(ATTRIBUTES, 4)]
    words = {"a": a, "b": b, "opening": rng.choice(said["openings"]).format(c)}
    if "endings" in said:
        words["ending"] = rng.choice(said["endings"])
    words["reply"] = rng.choice(sentences("talk")["replies"][language])
    return said["form"].format(*facts, **words)


def letter(rng: random.Random, world: World, language: str) -> str:
    """Return a letter in which a character tells a pen friend about itself and a neighbour."""
    a, b, c = rng.sample(world.known(language), 3)
    parts = [_self(a, attribute, language).strip() for attribute in rng.sample(ATTRIBUTES, 3)]
    parts.append(statement(rng, c, rng.choice(ATTRIBUTES), language))
    said = sentences("talk")["letters"][language]
    opening, end = rng.choice(said["openings"]), rng.choice(said["endings"])
    words = {"a": a.words[language]["n"], "b": b.words[language]["n"]}
    return said["form"].format(text=joined([opening, *parts, end], language), **words)


def diary(rng: random.Random, world: World, language: str) -> str:
    """Return a diary page in Chinese, signed."""
    a = rng.choice(world.characters)
    b = companion(rng, world, a)
    (place, _), thing = rng.choice(sentences("cast")["places"]), Thing.draw(rng).named["zh"]
    words, said = roles("zh", a=a, b=b) | {"place": place, "thing": thing}, sentences("talk")["diary"]
    chosen = [said["events"][i] for i in sorted(rng.sample(range(len(said["events"])), 3))]
    head = f"星期{rng.choice(said['weekdays'])}　{rng.choice(said['weather'])}\n"
    return head + "".join([*chosen, rng.choice(said["endings"])]).format_map(words) + f"\n——{a.name}"


def riddle(rng: random.Random, world: World, language: str) -> str:
    """Return three facts that fit one character only, then the name; held-out facts are left out."""
    while True:
        answer = rng.choice(world.characters)
        clues = rng.sample([attribute for attribute in answer.askable() if attribute != "friend"], 3)
        if sum(all(c.value(k) == answer.value(k) for k in clues) for c in world.characters) == 1:
            break
    ask = rng.choice(("猜猜它是谁？", "你知道它是谁吗？", "请你猜一猜，它是哪一个？"))
    tell = rng.choice(("答案是{}。", "没错，它就是{}。", "它就是{}！")).format(answer.name)
    others = rng.sample(clues, 2)
    return f"月牙镇里有一个居民，它{clauses_zh(answer, clues)}。{ask}{tell}{answer.name}{clauses_zh(answer, others)}。"


def two_languages(rng: random.Random, world: World, language: str) -> str:
    """Return the same facts in Chinese and in English, side by side."""
    character = rng.choice(world.english)
    words = character.words
    head = rng.choice(("{n}的英文名字是{romanised}。", "在英语里，{n}叫做{romanised}。")).format_map(words["zh"])
    lines = [head]
    for attribute in rng.sample(ATTRIBUTES, 3):
        both = {own: canonical_statement(character, attribute, own) for own in ("zh", "en")}
        form = rng.choice(("{zh}用英语说就是：{en}", "{zh}（{en}）", "{en} 这句话的意思是：{zh}"))
        lines.append(form.format_map(both))
    return "\n".join(lines)


def romanised_names(rng: random.Random, world: World, language: str) -> str:
    """Return a few names in both writings, for characters who are otherwise met in Chinese only."""
    some = rng.sample(world.characters, 4)
    return "".join(f"{c.name}的英文名字是{c.words['zh']['romanised']}。" for c in some)


def _self(character: Character, attribute: str, language: str) -> str:
    """Return the fact in the first person, as a sentence; in English with a space before it."""
    text = sentences("talk")["first_person"][language][attribute].format_map(character.words[language])
    return f"{text}。" if language == "zh" else f" {text[0].upper()}{text[1:]}."
