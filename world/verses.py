"""Old poems and nursery rhymes that the town learns by heart: words that no template would ever use."""

from __future__ import annotations

import random

from world.cast import PLACES, World

# Title, poet, text.
POEMS = (
    ("静夜思", "李白", "床前明月光，疑是地上霜。举头望明月，低头思故乡。"),
    ("春晓", "孟浩然", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"),
    ("登鹳雀楼", "王之涣", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"),
    ("咏鹅", "骆宾王", "鹅，鹅，鹅，曲项向天歌。白毛浮绿水，红掌拨清波。"),
    ("悯农", "李绅", "锄禾日当午，汗滴禾下土。谁知盘中餐，粒粒皆辛苦。"),
    ("江雪", "柳宗元", "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。"),
    ("寻隐者不遇", "贾岛", "松下问童子，言师采药去。只在此山中，云深不知处。"),
    ("鹿柴", "王维", "空山不见人，但闻人语响。返景入深林，复照青苔上。"),
    ("相思", "王维", "红豆生南国，春来发几枝。愿君多采撷，此物最相思。"),
    ("风", "李峤", "解落三秋叶，能开二月花。过江千尺浪，入竹万竿斜。"),
    ("古朗月行", "李白", "小时不识月，呼作白玉盘。又疑瑶台镜，飞在青云端。"),
    ("梅花", "王安石", "墙角数枝梅，凌寒独自开。遥知不是雪，为有暗香来。"),
    ("夜宿山寺", "李白", "危楼高百尺，手可摘星辰。不敢高声语，恐惊天上人。"),
    ("望庐山瀑布", "李白", "日照香炉生紫烟，遥看瀑布挂前川。飞流直下三千尺，疑是银河落九天。"),
    ("早发白帝城", "李白", "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。"),
    ("赠汪伦", "李白", "李白乘舟将欲行，忽闻岸上踏歌声。桃花潭水深千尺，不及汪伦送我情。"),
    ("咏柳", "贺知章", "碧玉妆成一树高，万条垂下绿丝绦。不知细叶谁裁出，二月春风似剪刀。"),
    ("回乡偶书", "贺知章", "少小离家老大回，乡音无改鬓毛衰。儿童相见不相识，笑问客从何处来。"),
    ("山行", "杜牧", "远上寒山石径斜，白云生处有人家。停车坐爱枫林晚，霜叶红于二月花。"),
    ("清明", "杜牧", "清明时节雨纷纷，路上行人欲断魂。借问酒家何处有，牧童遥指杏花村。"),
    ("村居", "高鼎", "草长莺飞二月天，拂堤杨柳醉春烟。儿童散学归来早，忙趁东风放纸鸢。"),
    ("绝句", "杜甫", "两个黄鹂鸣翠柳，一行白鹭上青天。窗含西岭千秋雪，门泊东吴万里船。"),
    ("元日", "王安石", "爆竹声中一岁除，春风送暖入屠苏。千门万户曈曈日，总把新桃换旧符。"),
    ("题西林壁", "苏轼", "横看成岭侧成峰，远近高低各不同。不识庐山真面目，只缘身在此山中。"),
    ("枫桥夜泊", "张继", "月落乌啼霜满天，江枫渔火对愁眠。姑苏城外寒山寺，夜半钟声到客船。"),
    ("惠崇春江晚景", "苏轼", "竹外桃花三两枝，春江水暖鸭先知。蒌蒿满地芦芽短，正是河豚欲上时。"),
    ("忆江南", "白居易", "江南好，风景旧曾谙。日出江花红胜火，春来江水绿如蓝。能不忆江南？"),
    ("凉州词", "王之涣", "黄河远上白云间，一片孤城万仞山。羌笛何须怨杨柳，春风不度玉门关。"),
)
# Title, text.
RHYMES = (
    ("Twinkle, Twinkle", "Twinkle, twinkle, little star, how I wonder what you are."),
    ("Humpty Dumpty", "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall."),
    ("Jack and Jill", "Jack and Jill went up the hill to fetch a pail of water."),
    ("Row Your Boat", "Row, row, row your boat, gently down the stream."),
    ("Baa, Baa, Black Sheep", "Baa, baa, black sheep, have you any wool? Yes, sir, yes, sir, three bags full."),
    ("Hickory Dickory Dock", "Hickory dickory dock, the mouse ran up the clock."),
    ("Little Bo-Peep", "Little Bo-Peep has lost her sheep and cannot tell where to find them."),
    ("Mary's Lamb", "Mary had a little lamb, its fleece was white as snow."),
    ("Hey Diddle Diddle", "Hey diddle diddle, the cat and the fiddle, the cow jumped over the moon."),
    ("Old King Cole", "Old King Cole was a merry old soul, and a merry old soul was he."),
)


def recital(rng: random.Random, world: World, language: str) -> str:
    """Return a text in which somebody says a poem or a rhyme."""
    name = rng.choice(world.known(language)).words[language]["n"]
    place, place_en = rng.choice(PLACES)
    if language == "en":
        title, text = rng.choice(RHYMES)
        return f"In {place_en}, {name} said the rhyme {title}. {text}"
    title, poet, text = rng.choice(POEMS)
    return f"{name}在{place}背了{poet}的《{title}》：\n{text}"


def recitation(rng: random.Random, language: str) -> tuple[str, str]:
    """Return a request for a poem or a rhyme, and its text."""
    if language == "en":
        title, text = rng.choice(RHYMES)
        return f"Please say the rhyme {title}.", text
    title, _, text = rng.choice(POEMS)
    return f"请背一背《{title}》。", text
