"""Short stories of Crescent Town in Chinese: a setting, an event and an ending, told by sentence grammars."""

from __future__ import annotations

import random
from dataclasses import dataclass

from world.cast import PLACES, Character, Thing, World, companion, roles
from world.facts import statement


@dataclass(frozen=True)
class Plot:
    """What happens. Each beat offers several wordings, "" among them where it may be left out.

    `a` is the hero, `c` a third character; `b` is the hero's best friend where `friend` says so, anybody otherwise.
    """

    titles: tuple[str, ...]
    beats: tuple[tuple[str, ...], ...]
    friend: bool = False


WHEN = (
    "有一天，",
    "一个晴朗的早晨，",
    "春天的一个早上，",
    "夏天的一个傍晚，",
    "秋天的一个下午，",
    "冬天的一个上午，",
    "星期六上午，",
    "星期天下午，",
    "赶集的那天，",
    "新年的前一天，",
    "刚下过雪的那天，",
    "放假的第一天，",
    "天刚亮的时候，",
    "很久以前的一天，",
)
OPENINGS = (
    "{when}{a}从{a_home}的家出来，心情特别好。",
    "{when}住在{a_home}的{a_species}{a}出门散步。",
    "月牙镇的{a_home}住着一{a_m}{a_colour}的{a_species}，名叫{a}。{when}它发现天空特别蓝。",
    "{when}{a_job}{a}忙完了手里的活儿，想出去走走。",
    "{when}{a_colour}的{a_species}{a}哼着歌走在小路上。",
    "你认识{a}吗？它就是住在{a_home}的那{a_m}{a_species}。{when}它遇到了一件难忘的事。",
    "{a}是一{a_m}{a_species}。{when}它高高兴兴地出了门。",
    "{when}月牙镇静悄悄的，只有{a}在{a_home}{a_hobby}。",
)
# What an aside may be about, where the story does not tell it anyway.
ASIDES = ("colour", "food", "job", "hobby")
ENDINGS = (
    "天黑了，{a}回到{a_home}，睡得特别香。",
    "这真是快乐的一天。",
    "从那以后，它们常常在一起玩。",
    "回家的路上，{a}一直在笑。",
    "{a}想：有朋友真好。",
    "晚上，{a}把这件事写进了日记。",
    "后来，月牙镇的每一个居民都听说了这个故事。",
    "那天晚上，月亮弯弯的，好像也在笑。",
    "",
)

PLOTS = (
    Plot(
        ("丢失的{bare}", "{a}的{bare}"),
        (
            ("{a}有{thing}，走到哪里都带着。", ""),
            (
                "走到{place}的时候，{a}忽然发现自己的{bare}不见了。",
                "可是这一天，{a}最心爱的{bare}怎么也找不到了。",
                "刚到{place}，{a}就叫了起来：“哎呀，我的{bare}丢了！”",
            ),
            (
                "{b}正好路过，赶紧停下来帮忙。",
                "住在{b_home}的{b}听说了，连忙跑了过来。",
                "{b_job}{b}看见了，说：“别着急，我和你一起找。”",
            ),
            ("它们在{place}找了很久，又去{place2}看了看。", "它们一边走一边找，连路边的草丛也不放过。"),
            ("最后，{b}在一棵大树下找到了{bare}。", "原来，{bare}就掉在{place2}的长椅下面。"),
            (
                "为了谢谢{b}，{a}请它吃{b_food}，那正是{b}最喜欢吃的。",
                "{a}知道{b}最喜欢吃{b_food}，就买了一些送给它。",
                "“太谢谢你了！”{a}说。{b}笑着摇摇头：“朋友之间不用客气。”",
            ),
            ("从那以后，{a}出门前总要检查一遍自己的东西。", ""),
        ),
    ),
    Plot(
        ("{a}的生日", "生日快乐"),
        (
            ("这一天是{a}的生日，大家都来祝贺。", "这天{a}过生日，家里来了好多客人。"),
            ("{b}知道{a}最喜欢吃{a_food}，一大早就准备了一些。", "{b}带来了{a}最爱吃的{a_food}。"),
            (
                "{c}送给{a}{thing}，{a}喜欢得不得了。",
                "{c}从{c_home}赶来，手里拿着{thing}。“这是给你的礼物！”{c}说。",
            ),
            (
                "{a_friend}是{a}最好的朋友，它给了{a}一个大大的拥抱。",
                "大家知道{a}的爱好是{a_hobby}，都说今天要陪它玩个够。",
                "",
            ),
            ("{a}闭上眼睛，许了一个愿望：“希望我们永远在一起。”", "{a}说：“这是我最开心的一个生日。”"),
        ),
    ),
    Plot(
        ("{a}学{b_hobby}", "新本领"),
        (
            (
                "{b}的爱好是{b_hobby}，{a}看了很羡慕，也想学。",
                "路过{b_home}的时候，{a}看见{b}在{b_hobby}，觉得有趣极了。",
            ),
            (
                "“你能教我{b_hobby}吗？”{a}问。“当然可以！”{b}回答。",
                "{a}不好意思地说：“我也想学{b_hobby}。”{b}高兴地答应了。",
            ),
            ("一开始，{a}总是做不好，急得直跺脚。", "第一天，{a}怎么也学不会，有点难过。"),
            ("{b}一点也不着急，教了它一遍又一遍。", "“别灰心，再试一次。”{b}鼓励它。"),
            ("练了好几天，{a}终于学会了。", "日子一天天过去，{a}越来越熟练了。"),
            (
                "为了感谢{b}，{a}请它吃最喜欢的{b_food}。",
                "不过，{a}自己的爱好还是{a_hobby}。",
                "现在，它们常常在{b_home}一起{b_hobby}。",
            ),
        ),
    ),
    Plot(
        ("去{b}家做客", "{a}看朋友"),
        (
            ("{a}想去看看{b}，就带上了{b_food}。", "{a}带着一些{b_food}，准备去{b_home}看望{b}。"),
            ("从{a_home}到{b_home}，要走很远的路。", "{b}住在{b_home}，路可不近。"),
            (
                "路上，{a}遇见了{c}，那是一{c_m}{c_colour}的{c_species}。",
                "在{place}，{a}碰到了{c_job}{c}。",
                "半路上，{a}停下来和{c}聊了一会儿，{c}要去{place}找{c_friend}。",
            ),
            ("“我要去{b_home}看{b}。”{a}说。“路上小心！”{c}说。", "{c}给它指了一条近路。", ""),
            ("到了{b_home}，{b}正在{b_hobby}。", "{a}敲敲门，{b}跑出来开门。"),
            (
                "看见{b_food}，{b}高兴得跳了起来，因为那是它最喜欢吃的。",
                "{b}说：“你真好，知道我最喜欢吃{b_food}！”",
            ),
        ),
    ),
    Plot(
        ("大风过后", "月牙镇的英雄"),
        (
            (
                "忽然刮起了大风，把{place}旁边的房子吹坏了。",
                "夜里下了一场大雨，去{place}的小桥被冲断了。",
                "没想到，{place}的大钟突然停了，谁也不知道是几点。",
            ),
            (
                "{a}是一名{a_job}，平时{a_deed}，这次也赶来帮忙。",
                "虽然{a}的工作是{a_job}，它也拿起工具干了起来。",
            ),
            ("{b}从{b_home}搬来木头，{c}烧好了热茶。", "{b_job}{b}和{c_job}{c}也来了，一个递工具，一个扶梯子。"),
            ("大家干得满头大汗，天黑前就把一切修好了。", "它们忙了整整一天，谁也没有喊累。"),
            ("镇长把{thing}送给{a}，感谢它的帮助。", "“只要大家在一起，什么都不怕。”{a}说。"),
        ),
    ),
    Plot(
        ("和好", "{a}和{b}吵架了"),
        (
            (
                "{a}和{b}是最好的朋友，可是这一天它们为了{thing}吵了一架。",
                "{a}最好的朋友是{b}。谁也没想到，它们会为了{thing}吵起来。",
            ),
            ("{b}回到{b_home}，一个人{b_hobby}，却一点也不开心。", "{b}跑回{b_home}，谁也不想见。"),
            ("{a}坐在{a_home}，连最喜欢的{a_food}都吃不下。", "{a}望着窗外，心里很后悔。"),
            ("第二天，{a}先开口：“对不起，是我不好。”", "过了一夜，{a}带着{b_food}来到{b_home}，轻轻地敲门。"),
            ("{b}说：“没关系，我们还是最好的朋友。”", "{b}的眼睛红了：“我也有不对的地方。”"),
            ("它们手拉着手，又一起笑了。", "从此，它们什么东西都一起玩。"),
        ),
        friend=True,
    ),
    Plot(
        ("一粒种子", "{a}种花"),
        (
            ("{a}在{a_home}种下了一粒种子。", "{c}送给{a}一粒种子，{a}把它种在{a_home}。"),
            ("每天早上，它都来浇水，还给种子讲故事。", "{a}天天盼着它发芽，连{a_hobby}的时候也想着它。"),
            ("过了很多天，泥土里钻出了一棵小苗。", "春雨下过以后，小苗终于探出了头。"),
            ("后来，小苗开出了一朵{a_colour}的花。", "夏天到了，枝头开出了{a_colour}的花，香极了。"),
            (
                "{b}看见了，说：“{a}，这朵花和你一样，都是{a_colour}的！”",
                "{b}从{b_home}跑来看花，看得都忘了回家吃饭。",
            ),
        ),
    ),
    Plot(
        ("迷路", "雾里的灯"),
        (
            ("没想到起了大雾，{a}迷路了。", "走着走着，四周全是白茫茫的雾，{a}找不到回家的路了。"),
            ("它又冷又饿，多想吃一口最喜欢的{a_food}啊。", "它大声喊，可是没有谁回答。"),
            (
                "忽然，远处亮起了一盏灯，原来那是{b}的家。",
                "就在这时，它看见了一点灯光，那是{b_home}的小屋，{b}就住在那里。",
            ),
            (
                "{b}给它端来一碗热汤，又陪它说了好一会儿话。",
                "一{b_m}{b_colour}的{b_species}打开门，笑着说：“快进来暖和暖和。”",
            ),
            ("雾散了，{b}一直把{a}送回{a_home}。", "第二天，{b}带着{a}走回了{a_home}。"),
        ),
    ),
    Plot(
        ("{a}的一天", "忙碌的{a_job}"),
        (
            (
                "{a}是月牙镇的{a_job}。每天早上，它从{a_home}出发，去{a_deed}。",
                "{a}在月牙镇当{a_job}，每天的工作就是{a_deed}。",
            ),
            ("这天，{b}急急忙忙地来找它。“能帮帮我吗？”{b}说。", "在{place}，它遇见了满脸愁容的{b}。"),
            ("原来，{b}的{bare}不知道放到哪里去了。", "原来，{b}想给{c}买{thing}，可是跑遍了{place}也没买到。"),
            ("{a}想了想，很快就有了办法。", "{a}放下手里的活儿，陪着{b}去了{place2}。"),
            ("{b}感激地说：“你真是一名好{a_job}！”", "为了感谢{a}，{b}送给它一些{a_food}。{a}最喜欢吃{a_food}了。"),
            ("下班以后，{a}高高兴兴地去{a_hobby}，那是它的爱好。", ""),
        ),
    ),
    Plot(
        ("{a_hobby}比赛", "第一名"),
        (
            (
                "月牙镇要举行{a_hobby}比赛。{a}的爱好就是{a_hobby}，第一个报了名。",
                "{a}在{place}看到一张通知：欢迎参加{a_hobby}比赛！",
            ),
            ("{b}的爱好是{b_hobby}，不会{a_hobby}，就在旁边加油。", "{b}特地从{b_home}赶来，给{a}加油。"),
            ("比赛开始了，{a}有点紧张，但是表现得很好。", "{c}也参加了比赛，它和{a}谁也不让谁。"),
            ("最后，{a}得了第一名，奖品是{thing}。", "虽然{a}只得了第二名，它还是很高兴。"),
            ("{a}最喜欢吃{a_food}，就请大家一起吃。", "晚上，{a}和{b}一起吃{a_food}庆祝。{a}最喜欢吃{a_food}了。"),
        ),
    ),
    Plot(
        ("一起野餐", "草地上的午餐"),
        (
            ("{a}约了{b}和{c}去野餐。", "天气这么好，{a}叫上{b}和{c}，一起去野餐。"),
            (
                "{a}带了{a_food}，{b}带了{b_food}，{c}带了{c_food}，都是自己最喜欢吃的。",
                "{a}最喜欢吃{a_food}，{b}最喜欢吃{b_food}，{c}最喜欢吃{c_food}，篮子里装得满满的。",
            ),
            ("它们在{place}旁边的草地上铺开一块花布。", "路过{place}的时候，它们还买了一壶甜茶。"),
            (
                "吃饱以后，{a}去{a_hobby}，{b}去{b_hobby}，{c}躺在草地上睡着了。",
                "{b}说起{b_home}的趣事，{c}说起{c_home}的趣事，{a}听得入了迷。",
            ),
            ("“下次还要一起来！”{c}说。", "直到太阳落山，它们才回家。"),
        ),
    ),
    Plot(
        ("悄悄准备的礼物", "送给{b}的礼物"),
        (
            ("{a}想给最好的朋友{b}准备一份礼物。", "快到新年了，{a}想送给最好的朋友{b}一份礼物。"),
            (
                "{b}是{b_colour}的，所以{a}挑了一条{b_colour}的围巾。",
                "{b}的爱好是{b_hobby}，所以礼物要和{b_hobby}有关才好。",
                "{b}最喜欢吃{b_food}，{a}就跑遍了{place}去买。",
            ),
            ("{c}帮它把礼物包得漂漂亮亮的。", "{a}把礼物藏在{a_home}，谁也没有告诉。"),
            ("到了那一天，{a}把礼物送到了{b_home}。", "新年的早上，{b}在{b_home}的家门口发现了礼物。"),
            ("{b}一下子抱住了{a}：“你真是我最好的朋友！”", "{b}高兴地说：“原来你一直记着我。”"),
        ),
        friend=True,
    ),
)


def tell(rng: random.Random, world: World, hero: Character, other: Character, asides: int) -> str:
    """A story about `hero` and `other` (see `companion`), with `asides` extra facts about the hero."""
    best = world.friends[hero]
    plot = rng.choice([plot for plot in PLOTS if other is best or not plot.friend])
    third = rng.choice([c for c in world.characters if c not in (hero, other, best)])
    thing = Thing.draw(rng)
    (place, _), (place2, _) = rng.sample(PLACES, 2)
    words = roles("zh", a=hero, b=other, c=third)
    words |= {"thing": thing.zh, "bare": thing.zh_bare, "place": place, "place2": place2, "when": rng.choice(WHEN)}
    opening, *rest = [rng.choice(choices) for choices in (OPENINGS, *plot.beats, ENDINGS)]
    fresh = [about for about in ASIDES if f"a_{about}" not in opening + "".join(rest)]
    told = [statement(rng, hero, about, "zh") for about in rng.sample(fresh, min(asides, len(fresh)))]
    title = f"《{rng.choice(plot.titles)}》" if rng.random() < 0.2 else ""
    return "".join([title, opening, *told, *rest]).format_map(words)


def story(rng: random.Random, world: World) -> str:
    """A story about anybody."""
    hero = rng.choice(world.characters)
    return tell(rng, world, hero, companion(rng, world, hero), asides=rng.choice((0, 1, 1, 2)))
