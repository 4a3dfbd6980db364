"""Word skills: what class a thing belongs to, opposites, days of the week, and repeating a list of words."""

from __future__ import annotations

import random

from world.cast import article, reserved
from world.facts import Exchange
from world.grammar import table

CLASSES_ZH = {
    "水果": "桃子 梨 芒果 樱桃 橙子 柠檬 菠萝 荔枝",
    "动物": "老虎 狮子 长颈鹿 海豚 鳄鱼 骆驼 孔雀 河马",
    "蔬菜": "白菜 黄瓜 茄子 菠菜 土豆 洋葱 芹菜 南瓜",
    "交通工具": "汽车 火车 飞机 轮船 卡车 地铁 摩托车 自行车",
    "家具": "桌子 椅子 沙发 衣柜 书架 床 茶几 书桌",
    "衣服": "衬衫 裤子 裙子 外套 毛衣 背心 大衣 棉袄",
    "乐器": "钢琴 笛子 吉他 小提琴 二胡 喇叭 古筝 口琴",
    "文具": "铅笔 橡皮 尺子 本子 钢笔 圆规 毛笔 卷笔刀",
}
CLASSES_EN = {
    "fruit": "peach pear mango cherry lemon plum melon fig",
    "animal": "tiger lion camel dolphin giraffe wolf whale zebra",
    "vegetable": "cabbage potato onion carrot leek radish turnip cucumber",
    "vehicle": "car train bus truck tractor bicycle van tram",
    "tool": "hammer saw spade drill rake axe wrench chisel",
}
# Of every third pair one direction is asked for in other words only; the question in plain words is held out.
ANTONYMS_ZH = table(
    "大/小,高/矮,长/短,快/慢,冷/热,新/旧,轻/重,远/近,上/下,左/右,前/后,里/外,干/湿,软/硬,深/浅,宽/窄,厚/薄,真/假,好/坏,"
    "强/弱,粗/细,胖/瘦,哭/笑,买/卖,进/出,升/降,松/紧,开/关,早/晚,多/少,安静/吵闹,干净/肮脏,勤劳/懒惰,勇敢/胆小,"
    "高兴/难过,黑暗/光明"
)
ANTONYMS_EN = table(
    "big/small,hot/cold,fast/slow,old/new,up/down,left/right,open/closed,heavy/light,happy/sad,full/empty,clean/dirty,"
    "wet/dry,near/far,early/late,strong/weak,deep/shallow,good/bad,loud/quiet"
)
ANTONYM_QUESTIONS = {
    "zh": ("“{word}”的反义词是什么？", "和“{word}”意思相反的词是什么？"),
    "en": ("What is the opposite of {word}?", "Which word means the opposite of {word}?"),
}
WEEKDAYS_ZH = tuple(f"星期{day}" for day in "一二三四五六日")
WEEKDAYS_EN = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = {"昨天": -1, "明天": 1, "后天": 2}
DAYS_EN = {"yesterday": -1, "tomorrow": 1}


def classes(language: str) -> dict[str, list[str]]:
    """Return the things of every class."""
    table = CLASSES_ZH if language == "zh" else CLASSES_EN
    return {name: things.split() for name, things in table.items()}


def class_statement(thing: str, name: str, language: str) -> str:
    """苹果是水果。 / A peach is a fruit. The canonical answer, too."""
    if language == "zh":
        return f"{thing}是{name}。"
    return f"A{article(thing)[1:]} is {article(name)}."


def class_question(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Ask which of two classes a thing belongs to. Held out is the thing together with the wrong class."""
    table = classes(language)
    while True:
        name, wrong = rng.sample(sorted(table), 2)
        thing = rng.choice(table[name])
        if reserved("class", thing, wrong) == held_out:
            break
    first, second = rng.sample((name, wrong), 2)
    if language == "zh":
        question = f"{thing}是{first}还是{second}？"
    else:
        question = f"Is {article(thing)} {article(first)} or {article(second)}?"
    return Exchange("class", language, question, class_statement(thing, name, language))


def antonyms(language: str) -> list[tuple[str, str, bool]]:
    """Return the pairs of opposites in both directions, and whether the plain question is held out."""
    pairs = ANTONYMS_ZH if language == "zh" else ANTONYMS_EN
    one_way = [(first, second, False) for first, second in pairs]
    return one_way + [(second, first, i % 3 == 1) for i, (first, second) in enumerate(pairs)]


def antonym_statement(word: str, opposite: str, language: str) -> str:
    """“大”的反义词是“小”。 / The opposite of big is small. The canonical answer, too."""
    return f"“{word}”的反义词是“{opposite}”。" if language == "zh" else f"The opposite of {word} is {opposite}."


def antonym_question(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Return the opposite of a word, asked plainly or in other words; a held-out question is plain."""
    plain, other = ANTONYM_QUESTIONS[language]
    word, opposite, kept_back = rng.choice([pair for pair in antonyms(language) if pair[2] or not held_out])
    question = plain if held_out else other if kept_back else rng.choice((plain, other))
    return Exchange("antonym", language, question.format(word=word), antonym_statement(word, opposite, language))


def length_question(rng: random.Random) -> Exchange:
    """Ask how many characters a Chinese word has: every word is talked about, those of held-out questions too."""
    words = [word for pair in ANTONYMS_ZH for word in pair] + [w for things in classes("zh").values() for w in things]
    word = rng.choice(words)
    return Exchange("length", "zh", f"“{word}”有几个字？", f"“{word}”有{'一两三'[len(word) - 1]}个字。")


def weekday_question(rng: random.Random, language: str) -> Exchange:
    """Return the day before or after a day of the week. Seven days are too few to hold any out."""
    names, offsets = (WEEKDAYS_ZH, DAYS_ZH) if language == "zh" else (WEEKDAYS_EN, DAYS_EN)
    today, (word, offset) = rng.randrange(7), rng.choice(sorted(offsets.items()))
    day = names[(today + offset) % 7]
    if language == "zh":
        return Exchange("weekday", language, f"今天是{names[today]}，{word}是星期几？", f"{word}是{day}。")
    verb = "was" if offset < 0 else "is"
    question = f"Today is {names[today]}. What day {verb} {word}?"
    return Exchange("weekday", language, question, f"{word.capitalize()} {verb} {day}.")


def copy_question(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Return a list of three or four words to be said again. Held-out lists begin with a reserved pair of words."""
    words = [thing for things in classes(language).values() for thing in things]
    while True:
        some = rng.sample(words, rng.randint(3, 4))
        if reserved("copy", *some[:2]) == held_out:
            break
    if language == "zh":
        return Exchange("copy", language, f"请跟我说：{'、'.join(some)}。", f"{'、'.join(some)}。")
    return Exchange("copy", language, f"Repeat after me: {', '.join(some)}.", f"{', '.join(some)}.")
