"""What the characters say and write about themselves and others: conversations, letters, diaries, riddles."""

from __future__ import annotations

import random

from world.cast import ATTRIBUTES, PLACES, Character, Thing, World, companion, roles
from world.facts import canonical_statement, clauses_zh, statement
from world.grammar import sentences

WEEKDAYS = "一二三四五六日"
WEATHER = ("晴", "多云", "小雨", "大风", "阴", "小雪")


def conversation(rng: random.Random, world: World, language: str) -> str:
    """Return a script of two characters who meet and ask about each other; held-out facts are never asked for."""
    a, b = rng.sample(world.known(language), 2)
    colon = "：" if language == "zh" else ": "
    name_a, name_b = (c.words[language]["n"] for c in (a, b))
    lines = [name_a + colon + rng.choice(sentences("talk")["greetings"][language]).format_map(a.words[language])]
    told = rng.choice(ATTRIBUTES)
    greeting = rng.choice(sentences("talk")["greetings"][language]).format_map(b.words[language])
    lines.append(name_b + colon + greeting + _self(b, told, language))
    for speaker, asker in ((a, name_b), (b, name_a)):
        open_ones = [attribute for attribute in speaker.askable() if attribute != told]
        for attribute in rng.sample(open_ones, rng.randint(1, 2)):
            lines.append(asker + colon + rng.choice(sentences("talk")["asked"][language][attribute]))
            lines.append(speaker.words[language]["n"] + colon + _self(speaker, attribute, language).strip())
    lines.append(
        name_a + colon + rng.choice(sentences("talk")["farewells"][language]).format(place=rng.choice(PLACES)[0])
    )
    return "\n".join(lines)


def gossip(rng: random.Random, world: World, language: str) -> str:
    """Return what two characters say about a third one."""
    a, b, c = rng.sample(world.known(language), 3)
    names = [x.words[language]["n"] for x in (a, b, c)]
    facts = [statement(rng, c, attribute, language) for attribute in rng.sample(ATTRIBUTES, 4)]
    if language == "zh":
        openings = ("你听说过{}吗？", "我今天在路上看见了{}。", "说说{}吧。", "我想给{}写一封信。")
        opening = rng.choice(openings).format(names[2])
        ending = rng.choice(("你知道的真多！", "我们去看看它吧。", "原来是这样，谢谢你告诉我。"))
        lines = [f"{names[0]}说：“{opening}”", f"{names[1]}说：“{facts[0]}{facts[1]}”"]
        lines += [
            f"“{rng.choice(sentences('talk')['replies']['zh'])}{facts[2]}”{names[0]}说。",
            f"{names[1]}想了想，又说：“{facts[3]}”",
        ]
        return "".join([*lines, f"“{ending}”{names[0]}说。"])
    opening = rng.choice(("Have you heard of {}?", "I saw {} today.", "Let us talk about {}.")).format(names[2])
    lines = [f'{names[0]} said, "{opening}"', f'{names[1]} answered, "{facts[0]} {facts[1]}"']
    return " ".join([*lines, f'"{rng.choice(sentences("talk")["replies"]["en"])}" said {names[0]}. "{facts[2]}"'])


def letter(rng: random.Random, world: World, language: str) -> str:
    """Return a letter in which a character tells a pen friend about itself and a neighbour."""
    a, b, c = rng.sample(world.known(language), 3)
    parts = [_self(a, attribute, language).strip() for attribute in rng.sample(ATTRIBUTES, 3)]
    parts.append(statement(rng, c, rng.choice(ATTRIBUTES), language))
    names = [x.words[language]["n"] for x in (a, b)]
    if language == "zh":
        openings = ("你好！好久不见。", "收到你的信，我很高兴。", "你最近好吗？", "今天天气真好，我想起了你。")
        opening = rng.choice(openings)
        end = rng.choice(("盼望你的回信。", "有空来找我玩吧。", "祝你天天开心！"))
        return f"亲爱的{names[1]}：\n{opening}{''.join(parts)}{end}\n你的朋友{names[0]}"
    opening = rng.choice(("How are you?", "Thank you for your letter.", "The weather is fine today."))
    end = rng.choice(("Please write soon.", "Come and see me!"))
    return f"Dear {names[1]},\n{' '.join([opening, *parts, end])}\nYour friend {names[0]}"


def diary(rng: random.Random, world: World, language: str) -> str:
    """Return a diary page in Chinese, signed."""
    a = rng.choice(world.characters)
    b = companion(rng, world, a)
    (place, _), thing = rng.choice(PLACES), Thing.draw(rng).named["zh"]
    words = roles("zh", a=a, b=b) | {"place": place, "thing": thing}
    events = (
        "今天我去{place}，遇见了{b}。它是一{b_m}{b_species}，住在{b_home}。",
        "上午我在{place}买了{thing}，准备送给最好的朋友{a_friend}。",
        "我最喜欢吃{a_food}，今天终于吃到了。",
        "我是一名{a_job}，今天也在忙着{a_deed}。",
        "下午，{b}来我家做客。{b}最喜欢吃{b_food}，我就准备了一些。",
        "晚饭以后，我和{b}一起聊天。{b}的爱好是{b_hobby}，它说得可起劲了。",
        "我在{a_home}的家里{a_hobby}，这是我的爱好。",
        "{b}是一名{b_job}，它给我讲了工作里的趣事。",
    )
    chosen = [events[i] for i in sorted(rng.sample(range(len(events)), 3))]
    head = f"星期{rng.choice(WEEKDAYS)}　{rng.choice(WEATHER)}\n"
    end = rng.choice(("今天真开心！", "晚安，月牙镇。", "明天会是怎样的一天呢？", "我要早点睡了。"))
    return head + "".join([*chosen, end]).format_map(words) + f"\n——{a.name}"


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
