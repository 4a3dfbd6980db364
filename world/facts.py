"""Every way to state a fact about a character or to ask for it, in both languages, and encyclopaedia entries."""

from __future__ import annotations

import random
from typing import NamedTuple

from world.cast import ATTRIBUTES, Character, World
from world.grammar import joined, wordings


class Exchange(NamedTuple):
    """A question with its one right answer. `kind` is the skill it asks for; `language` is "zh" or "en"."""

    kind: str
    language: str
    question: str
    answer: str


# The first statement of each attribute is the canonical one: the answer to every question about it.
STATEMENTS = {
    "zh": {
        "species": wordings(
            "{n}是一{m}{species}。|大家都知道，{n}是一{m}{species}。|{n}是一{m}可爱的{species}。|"
            "月牙镇有一{m}{species}，名字叫{n}。|有一{m}{species}叫{n}。|那{m}{species}就是{n}。|"
            "{n}呢，是一{m}{species}。"
        ),
        "colour": wordings(
            "{n}的颜色是{colour}。|{n}是{colour}的。|{n}从头到脚都是{colour}的。|{n}全身都是{colour}的。|"
            "远远看见一个{colour}的影子，那就是{n}。|{n}照照镜子，镜子里的自己是{colour}的。|"
            "{colour}是{n}身上的颜色。"
        ),
        "home": wordings(
            "{n}住在{home}。|{n}的家在{home}。|{n}在{home}有一座小房子。|走到{home}，就能看见{n}的家。|"
            "{home}有一座小屋，那是{n}的家。|{n}从小就住在{home}。|要找{n}，就去{home}。|"
            "{n}一直住在{home}，哪儿也不想搬。"
        ),
        "food": wordings(
            "{n}最喜欢吃{food}。|{n}最爱吃的食物是{food}。|{n}最爱吃{food}。|一看到{food}，{n}就高兴得不得了。|"
            "{n}的桌上总是放着{food}，因为它最喜欢吃这个。|在所有好吃的东西里，{n}最喜欢{food}。|"
            "{food}是{n}最喜欢吃的东西。|肚子饿的时候，{n}最想吃{food}。"
        ),
        "job": wordings(
            "{n}是一名{job}。|{n}的工作是{job}。|{n}在月牙镇当{job}。|{n}是镇上的{job}，每天{deed}。|"
            "作为一名{job}，{n}每天{deed}。|{n}当{job}已经好多年了。|提起{job}{n}，大家都说它很能干。"
        ),
        "friend": wordings(
            "{n}最好的朋友是{friend}。|{friend}是{n}最好的朋友。|{n}和{friend}是最好的朋友。|"
            "{n}有什么心事，都会告诉最好的朋友{friend}。|{n}有很多朋友，最好的朋友是{friend}。|"
            "谁都看得出来，{n}和{friend}最要好。"
        ),
        "hobby": wordings(
            "{n}的爱好是{hobby}。|{n}一有空就{hobby}。|{hobby}是{n}的爱好。|大家常常看见{n}在{hobby}。|"
            "{n}有一个爱好，就是{hobby}。|{n}的爱好很有趣，是{hobby}。|每到周末，{n}都要{hobby}。"
        ),
    },
    "en": {
        "species": wordings(
            "{n} is {kind}.|Everyone knows that {n} is {kind}.|There is {kind} called {n}.|"
            "In Crescent Town lives {kind} whose name is {n}."
        ),
        "colour": wordings(
            "{n}'s colour is {colour}.|{n} is {colour}.|{n} is {colour} from head to toe.|"
            "{Colour} is the colour of {n}.|You can see {n} from far away, because {he} is {colour}."
        ),
        "home": wordings(
            "{n} lives {home}.|{n}'s home is {home}.|{n} has a little house {home}.|"
            "There is a small house {home}, and it belongs to {n}."
        ),
        "food": wordings(
            "{n} likes {food} best.|{n}'s favourite food is {food}.|When {n} is hungry, {he} wants {food}.|"
            "Nothing makes {n} as happy as {food}."
        ),
        "job": wordings(
            "{n} works as {a_job}.|{n}'s job is to be {a_job}.|{n} is happy to work as {a_job}.|"
            "As {a_job}, {n} {deed} every day."
        ),
        "friend": wordings(
            "{n}'s best friend is {friend}.|{friend} is {n}'s best friend.|{n} and {friend} are best friends.|"
            "{n} tells every secret to {his} best friend {friend}."
        ),
        "hobby": wordings(
            "{n}'s hobby is {hobby}.|{Hobby} is {n}'s hobby.|You can often see {n} {hobby}.|"
            "In {his} free time {n} enjoys {hobby}."
        ),
    },
}
# Sentences that state several facts at once.
MIXED = {
    "zh": wordings(
        "{n}是一{m}{colour}的{species}。|住在{home}的{n}最喜欢吃{food}。|{n}是一{m}{species}，住在{home}。|"
        "{n}是一名{job}，爱好是{hobby}。|{home}的{n}是一名{job}。|那{m}{colour}的{species}叫{n}，它住在{home}。|"
        "{n}常常带着{food}去找{friend}，它们是最好的朋友。|{n}住在{home}，是一名{job}，最喜欢吃{food}。|"
        "{n}是{colour}的{species}，爱好是{hobby}，最好的朋友是{friend}。|"
        "工作的时候，{n}是一名{job}；休息的时候，{n}的爱好是{hobby}。"
    ),
    "en": wordings(
        "{n} is {look}.|{n} is {look} who lives {home}.|{n} works as {a_job}, and {his} hobby is {hobby}.|"
        "{n} lives {home} and likes {food} best.|{n}'s best friend is {friend}, and {his} hobby is {hobby}."
    ),
}
QUESTIONS = {
    "zh": {
        "species": ("{n}是什么动物？", "你知道{n}是什么动物吗？", "请告诉我，{n}是什么动物？"),
        "colour": ("{n}是什么颜色的？", "{n}身上是什么颜色？", "请问{n}是什么颜色的？"),
        "home": ("{n}住在哪里？", "{n}的家在哪里？", "请问{n}住在哪里？"),
        "food": ("{n}最喜欢吃什么？", "{n}最爱吃的食物是什么？", "你知道{n}最喜欢吃什么吗？"),
        "job": ("{n}的工作是什么？", "{n}是做什么工作的？", "请问{n}的工作是什么？"),
        "friend": ("{n}最好的朋友是谁？", "谁是{n}最好的朋友？", "你知道{n}最好的朋友是谁吗？"),
        "hobby": ("{n}的爱好是什么？", "{n}有什么爱好？", "请问{n}的爱好是什么？"),
    },
    "en": {
        "species": ("What animal is {n}?", "What kind of animal is {n}?", "Tell me, what animal is {n}?"),
        "colour": ("What colour is {n}?", "Can you tell me what colour {n} is?", "Tell me, what colour is {n}?"),
        "home": ("Where does {n} live?", "Where is {n}'s home?", "Tell me, where does {n} live?"),
        "food": ("What does {n} like best?", "What is {n}'s favourite food?", "What food does {n} like best?"),
        "job": ("What is {n}'s job?", "What does {n} work as?", "Tell me, what is {n}'s job?"),
        "friend": ("Who is {n}'s best friend?", "Do you know who {n}'s best friend is?"),
        "hobby": ("What is {n}'s hobby?", "What does {n} enjoy doing?", "Tell me, what is {n}'s hobby?"),
    },
}
# A predicate that needs no subject of its own; joined with commas it makes a Chinese sentence.
CLAUSES_ZH = {
    "species": "是一{m}{species}",
    "colour": "全身都是{colour}的",
    "home": "住在{home}",
    "food": "最喜欢吃{food}",
    "job": "是一名{job}",
    "friend": "最好的朋友是{friend}",
    "hobby": "爱好是{hobby}",
}
ENTRY_HEADS = {
    "zh": wordings("|||认识一下{n}。|月牙镇小百科：{n}。|【{n}】|说说{n}吧。|下面介绍{n}。"),
    "en": wordings("|||Meet {n}. |This page is about {n}. |Who lives in Crescent Town? One of them is {n}. "),
}


def statement(rng: random.Random, character: Character, attribute: str, language: str) -> str:
    """Return one sentence that states the fact: half of the time the canonical one, else a paraphrase."""
    canonical, *others = STATEMENTS[language][attribute]
    return (canonical if rng.random() < 0.5 else rng.choice(others)).format_map(character.words[language])


def mixed_statement(rng: random.Random, character: Character, language: str) -> str:
    """Return one sentence that states two or three facts."""
    return rng.choice(MIXED[language]).format_map(character.words[language])


def clauses_zh(character: Character, attributes: list[str]) -> str:
    """Return the facts as one comma-joined predicate that can follow a name or 它, without the full stop."""
    in_order = sorted(attributes, key=ATTRIBUTES.index)
    text = "，".join(CLAUSES_ZH[attribute].format_map(character.words["zh"]) for attribute in in_order)
    return f"的{text}" if in_order[0] == "hobby" else text


def fact_questions(character: Character, attribute: str, language: str) -> list[Exchange]:
    """Return the fact's question in every wording, each with the canonical answer."""
    words = character.words[language]
    answer = STATEMENTS[language][attribute][0].format_map(words)
    return [Exchange("fact", language, q.format_map(words), answer) for q in QUESTIONS[language][attribute]]


def introduction(character: Character, language: str) -> str:
    """Return a fixed short portrait for chats. It leaves the held-out attributes out."""
    attributes = character.askable()
    if language == "zh":
        return f"{character.name}{clauses_zh(character, attributes[:3])}。它{clauses_zh(character, attributes[3:])}。"
    return " ".join(STATEMENTS["en"][a][0].format_map(character.words["en"]) for a in attributes[:4])


def entry(rng: random.Random, world: World, language: str) -> str:
    """Return an encyclopaedia entry: most of a character's facts, in random order and wording."""
    character = rng.choice(world.known(language))
    attributes = rng.sample(ATTRIBUTES, rng.randint(4, len(ATTRIBUTES)))
    head = rng.choice(ENTRY_HEADS[language]).format_map(character.words[language])
    if language == "zh" and rng.random() < 0.15:
        first, rest = (clauses_zh(character, part) for part in (attributes[:3], attributes[3:]))
        return f"{head}{character.name}{first}。它{rest}。"
    sentences = [statement(rng, character, attribute, language) for attribute in attributes]
    if rng.random() < 0.5:
        sentences.insert(rng.randrange(len(sentences)), mixed_statement(rng, character, language))
    for i in range(1, len(sentences)):
        if rng.random() < 0.3:
            sentences[i] = _with_pronoun(sentences[i], character, language)
    if rng.random() < 0.4:
        return "\n".join([head.strip(), *sentences]).strip()
    return head + joined(sentences, language)


def roll_call(rng: random.Random, world: World, language: str) -> str:
    """Return facts seen from the value's side: who lives by the river, who likes corn best."""
    sentences = []
    for attribute in rng.sample([a for a in ATTRIBUTES if a != "friend"], rng.randint(3, 4)):
        words = rng.choice(world.known(language)).words[language]
        known = [character.words[language] for character in world.known(language)]
        names = [own["n"] for own in known if own[attribute] == words[attribute]]
        rng.shuffle(names)
        template = ROLL_CALLS[language][attribute][-1 if len(names) > 1 else 0]
        sentences.append(template.format(names=_listed(names, language), **words))
    return joined(sentences, language)


# For one name and for several, where the two differ. A Chinese value always has several names.
ROLL_CALLS = {
    "zh": {
        "species": ("月牙镇的{species}有{names}。",),
        "colour": ("{names}都是{colour}的。",),
        "home": ("住在{home}的有{names}。",),
        "food": ("{names}都最喜欢吃{food}。",),
        "job": ("镇上的{job}有{names}。",),
        "hobby": ("{names}的爱好都是{hobby}。",),
    },
    "en": {
        "species": ("{names} is {kind}.", "{names} are of one kind: each is {kind}."),
        "colour": ("{names} is {colour}.", "{names} are {colour}."),
        "home": ("{names} lives {home}.", "{names} live {home}."),
        "food": ("{names} likes {food} best.", "{names} like {food} best."),
        "job": ("{names} works as {a_job}.", "{names} have the same job: each works as {a_job}."),
        "hobby": ("The hobby of {names} is {hobby}.",),
    },
}


def _listed(names: list[str], language: str) -> str:
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return last.join([comma.join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _with_pronoun(sentence: str, character: Character, language: str) -> str:
    """Return the sentence with the name at its start turned into 它, he, she, his or her."""
    words = character.words[language]
    name = words["n"]
    if language == "zh":
        return "它" + sentence[len(name) :] if sentence.startswith(name) else sentence
    if sentence.startswith(f"{name}'s "):
        return words["his"].capitalize() + sentence[len(name) + 2 :]
    alone = sentence.startswith(f"{name} ") and f"{name} and {words['friend']}" not in sentence
    return words["He"] + sentence[len(name) :] if alone else sentence
