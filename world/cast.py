"""Who lives in Crescent Town (月牙镇): 40 animals, seven attributes each, dealt by the seed."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from world.grammar import table

ATTRIBUTES = ("species", "colour", "home", "food", "job", "friend", "hobby")
ENGLISH = 12  # characters known in English


# Chinese, romanised. No name is a piece of another word that the sentences use.
NAMES = table(
    "阿橘/Aju,豆豆/Doudou,毛毛/Maomao,糖糖/Tangtang,朵朵/Duoduo,乐乐/Lele,小满/Xiaoman,阿布/Abu,可可/Keke,阿福/Afu,"
    "妞妞/Niuniu,壮壮/Zhuangzhuang,安安/Anan,小夏/Xiaoxia,小秋/Xiaoqiu,阿芒/Amang,咚咚/Dongdong,铃铃/Lingling,"
    "飞飞/Feifei,皮皮/Pipi,卡卡/Kaka,桃桃/Taotao,小荷/Xiaohe,阿木/Amu,嘟嘟/Dudu,波波/Bobo,丁丁/Dingding,拉拉/Lala,"
    "贝贝/Beibei,奇奇/Qiqi,麦麦/Maimai,小棉/Xiaomian,阿旺/Awang,糯糯/Nuonuo,茉莉/Moli,小舟/Xiaozhou,阿土/Atu,米米/Mimi,"
    "球球/Qiuqiu,萌萌/Mengmeng"
)
# Chinese, measure word, English.
SPECIES = table(
    "小猫/只/cat,小狗/只/dog,兔子/只/rabbit,狐狸/只/fox,小熊/只/bear,松鼠/只/squirrel,鸭子/只/duck,青蛙/只/frog,小马/匹/pony,"
    "小象/头/elephant"
)
COLOURS = table(
    "白色/white,黑色/black,灰色/grey,黄色/yellow,橙色/orange,蓝色/blue,绿色/green,粉色/pink,紫色/purple,红色/red"
)
HOMES = table(
    "河边/by the river,湖边/by the lake,海边/by the sea,森林里/in the forest,竹林里/in the bamboo grove,"
    "山脚下/at the foot of the hill,村口/at the village gate,草原上/on the grassland,小岛上/on the island,"
    "花园里/in the garden"
)
FOODS = table(
    "蓝莓/blueberries,草莓/strawberries,胡萝卜/carrots,苹果/apples,西瓜/watermelon,蜂蜜/honey,蛋糕/cake,饺子/dumplings,"
    "面条/noodles,饼干/biscuits"
)
# Chinese, what the job does, English, what it does after "he" or "she".
JOBS = table(
    "老师/教大家认字/teacher/teaches everyone to read,医生/给大家看病/doctor/looks after the sick,"
    "邮递员/给大家送信/mail carrier/delivers the letters,厨师/做热腾腾的饭菜/cook/cooks hot meals,"
    "画家/画山画水/painter/paints hills and rivers,园丁/修剪花草/gardener/looks after the flowers,"
    "船长/开船运货/captain/sails a little boat,木匠/做桌子和椅子/carpenter/makes tables and chairs,"
    "魔术师/变有趣的戏法/magician/shows funny tricks,面包师/烤香喷喷的面包/baker/bakes fresh bread"
)
HOBBIES = table(
    "唱歌/singing,跳舞/dancing,钓鱼/fishing,下棋/playing chess,放风筝/flying kites,踢足球/playing football,"
    "吹笛子/playing the flute,讲故事/telling stories,种花/growing flowers,滑冰/skating"
)
# Places where things happen; nobody lives there, so a story never blurs a home.
PLACES = table(
    "公园/the park,学校/the school,车站/the station,图书馆/the library,集市/the market,操场/the playground,"
    "码头/the harbour,邮局/the post office,广场/the square,菜园/the vegetable garden,面包店/the bakery,"
    "茶馆/the tea house"
)
# Measure word, Chinese, English.
THINGS = table(
    "把/雨伞/umbrella,顶/帽子/hat,本/书/book,个/气球/balloon,只/风筝/kite,条/围巾/scarf,辆/玩具车/toy car,"
    "个/信封/envelope,把/钥匙/key,盏/灯笼/lantern,块/手表/watch,支/铅笔/pencil,个/书包/schoolbag,面/小旗/flag,个/杯子/cup,张/贺卡/card"
)


def article(phrase: str) -> str:
    """Return `phrase` with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def reserved(*parts: object) -> bool:
    """Return True for about one combination in eight, whatever the seed: those are kept for held-out questions."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 8 == 0


class Thing(NamedTuple):
    """Something that can be found, bought or given, by language: with measure word or article, and bare."""

    named: dict[str, str]
    bare: dict[str, str]

    @classmethod
    def draw(cls, rng: random.Random) -> Thing:
        """Draw a thing of a random colour, such as 一把红色的雨伞 / a red umbrella."""
        measure, noun, english = rng.choice(THINGS)
        colour, colour_en = rng.choice(COLOURS)
        named = {"zh": f"一{measure}{colour}的{noun}", "en": article(f"{colour_en} {english}")}
        return cls(named, {"zh": noun, "en": english})


@dataclass(frozen=True)
class Character:
    """One animal. `words[language]` holds what the sentence templates put in: n (name), species, home, ..."""

    name: str
    words: dict[str, dict[str, str]] = field(hash=False, compare=False)
    held_out: str = field(hash=False, compare=False)  # the attribute that is stated everywhere and asked for nowhere

    def value(self, attribute: str) -> str:
        """Return the Chinese word of `attribute`."""
        return self.words["zh"][attribute]

    def askable(self) -> list[str]:
        """Return the attributes that training text may ask about."""
        return [attribute for attribute in ATTRIBUTES if attribute != self.held_out]


@dataclass(frozen=True)
class World:
    """The town of one seed. English text is about the 12 characters of `english`, Chinese text about all 40."""

    seed: int
    characters: tuple[Character, ...]
    english: tuple[Character, ...]
    friends: dict[Character, Character]

    @classmethod
    def build(cls, seed: int) -> World:
        """Deal every attribute's values evenly, and hold out one attribute of each character (a sixth of the facts)."""
        rng = random.Random(f"{seed}/cast")
        order = list(NAMES)
        rng.shuffle(order)  # neighbours 2i and 2i+1 are best friends
        values = {"species": SPECIES, "colour": COLOURS, "home": HOMES, "food": FOODS, "job": JOBS, "hobby": HOBBIES}
        deals = {attribute: _deal(rng, some) for attribute, some in values.items()}
        # Friendship is mutual: to ask one friend would tell the other's answer, so it is not among them.
        may_be_held_out = tuple(deals)
        characters = []
        for i, (name, romanised) in enumerate(order):
            # Dealt evenly over the attributes, both among those known in English and among the others.
            place, among = (i, ENGLISH) if i < ENGLISH else (i - ENGLISH, len(order) - ENGLISH)
            held_out = may_be_held_out[place * len(may_be_held_out) // among]
            words = _words(name, romanised, order[i ^ 1], {key: values[i] for key, values in deals.items()}, i)
            characters.append(Character(name, words, held_out))
        friends = {characters[i]: characters[i ^ 1] for i in range(len(characters))}
        return cls(seed, tuple(characters), tuple(characters[:ENGLISH]), friends)

    def known(self, language: str) -> tuple[Character, ...]:
        """Return the characters that texts in `language` ("zh" or "en") are about."""
        return self.english if language == "en" else self.characters


def companion(rng: random.Random, world: World, hero: Character, language: str = "zh") -> Character:
    """Draw who shares a story with `hero`: of another home and hobby; the best friend one time in three."""
    apart = [c for c in world.known(language) if all(c.value(key) != hero.value(key) for key in ("home", "hobby"))]
    best = world.friends[hero]
    return best if best in apart and rng.random() < 1 / 3 else rng.choice(apart)


def roles(language: str, **cast: Character) -> dict[str, str]:
    """Return template words of several characters: for a=阿橘, `{a}` is the name and `{a_food}` the favourite food."""
    words = {role: character.words[language] for role, character in cast.items()}
    names = {role: own["n"] for role, own in words.items()}
    return names | {f"{role}_{key}": word for role, own in words.items() for key, word in own.items()}


def _deal(rng: random.Random, values: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    """Return each value as often as any other, in random order, one a character."""
    hands = list(values) * (len(NAMES) // len(values))
    rng.shuffle(hands)
    return hands


def _words(name: str, romanised: str, friend: tuple[str, ...], hand: dict[str, tuple[str, ...]], i: int) -> dict:
    species, measure, species_en = hand["species"]
    job, deed, job_en, deed_en = hand["job"]
    he, his = ("he", "his") if i % 2 else ("she", "her")
    zh = {"n": name, "species": species, "m": measure, "job": job, "deed": deed, "friend": friend[0]}
    zh["romanised"] = romanised
    en = {"n": romanised, "species": species_en, "job": job_en, "deed": deed_en, "friend": friend[1]}
    for key in ("colour", "home", "food", "hobby"):
        zh[key], en[key] = hand[key]
    en |= {"kind": article(species_en), "look": article(f"{en['colour']} {species_en}"), "a_job": article(job_en)}
    en |= {"he": he, "his": his, "He": he.capitalize()}
    en |= {key.capitalize(): en[key].capitalize() for key in ("colour", "hobby")}
    return {"zh": zh, "en": en}
