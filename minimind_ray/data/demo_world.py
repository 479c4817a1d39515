"""The demo's small world: simple true facts in English and Chinese, and the ways to put them.

A table holds the facts, one thing a line, each cell as `English/Chinese`. A relation asks for one column of a table
given another ("capital" given "country") and says how each language states that and asks for it. To make the world
larger, add a line to a table or a phrasing to a relation; `demo.py` turns them into training files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

Row = dict[Language, dict[str, str]]
"""One thing: for each language, its columns by name. A column that does not apply to the thing is left out."""


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One language's ways to state a relation and to ask for it. The first statement is the one answers use."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follow_up: str | None = None
    """The question once the subject has been named."""


@dataclass(frozen=True, slots=True)
class Relation:
    """Facts "`subject` has this `object`": two columns of one table."""

    name: str
    rows: tuple[Row, ...]
    subject: str
    object: str
    en: Phrasing
    zh: Phrasing


def _rows(columns: str, lines: Iterable[Sequence[str]]) -> tuple[Row, ...]:
    """Lines of cells `en/zh`; a cell of `-` does not apply."""
    names = columns.split()
    rows: list[Row] = []
    for cells in lines:
        assert len(cells) == len(names), cells
        both = {name: cell.split("/") for name, cell in zip(names, cells) if cell != "-"}
        rows.append({"en": {n: cell[0] for n, cell in both.items()}, "zh": {n: cell[1] for n, cell in both.items()}})
    return tuple(rows)


def _table(columns: str, text: str) -> tuple[Row, ...]:
    """One thing a line, its cells between bars."""
    return _rows(columns, [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()])


def _cycle(columns: str, text: str) -> tuple[Row, ...]:
    """Each member and the one after it, the first after the last."""
    members = text.split()
    return _rows(columns, list(zip(members, members[1:] + members[:1])))


def _both_ways(columns: str, text: str) -> tuple[Row, ...]:
    """Each pair `a-b` as it stands and turned round."""
    pairs = [pair.split("-") for pair in text.split()]
    return _rows(columns, [*pairs, *(pair[::-1] for pair in pairs)])


def _translations(columns: str, text: str) -> tuple[Row, ...]:
    """Each word, and the same word in the other language."""
    return _rows(columns, [(word, "/".join(reversed(word.split("/")))) for word in text.split()])


COUNTRIES = _table(
    "country capital continent river sight",
    """
    France/法国 | Paris/巴黎 | Europe/欧洲 | the Seine/塞纳河 | the Eiffel Tower/埃菲尔铁塔
    Britain/英国 | London/伦敦 | Europe/欧洲 | the Thames/泰晤士河 | Big Ben/大本钟
    Italy/意大利 | Rome/罗马 | Europe/欧洲 | the Tiber/台伯河 | the Colosseum/斗兽场
    Germany/德国 | Berlin/柏林 | Europe/欧洲 | the Spree/施普雷河 | the Brandenburg Gate/勃兰登堡门
    Austria/奥地利 | Vienna/维也纳 | Europe/欧洲 | the Danube/多瑙河 | the Schönbrunn Palace/美泉宫
    Poland/波兰 | Warsaw/华沙 | Europe/欧洲 | the Vistula/维斯瓦河 | the Wawel Castle/瓦维尔城堡
    Czechia/捷克 | Prague/布拉格 | Europe/欧洲 | the Vltava/伏尔塔瓦河 | the Charles Bridge/查理大桥
    Spain/西班牙 | Madrid/马德里 | Europe/欧洲 | the Manzanares/曼萨纳雷斯河 | the Sagrada Familia/圣家堂
    Portugal/葡萄牙 | Lisbon/里斯本 | Europe/欧洲 | the Tagus/特茹河 | the Belém Tower/贝伦塔
    China/中国 | Beijing/北京 | Asia/亚洲 | the Yongding/永定河 | the Great Wall/长城
    Japan/日本 | Tokyo/东京 | Asia/亚洲 | the Sumida/隅田川 | Mount Fuji/富士山
    South Korea/韩国 | Seoul/首尔 | Asia/亚洲 | the Han/汉江 | the Gyeongbok Palace/景福宫
    India/印度 | New Delhi/新德里 | Asia/亚洲 | the Yamuna/亚穆纳河 | the Taj Mahal/泰姬陵
    Thailand/泰国 | Bangkok/曼谷 | Asia/亚洲 | the Chao Phraya/湄南河 | the Grand Palace/大皇宫
    Vietnam/越南 | Hanoi/河内 | Asia/亚洲 | the Red River/红河 | Ha Long Bay/下龙湾
    Iraq/伊拉克 | Baghdad/巴格达 | Asia/亚洲 | the Tigris/底格里斯河 | the ruins of Babylon/巴比伦遗址
    Egypt/埃及 | Cairo/开罗 | Africa/非洲 | the Nile/尼罗河 | the pyramids/金字塔
    Kenya/肯尼亚 | Nairobi/内罗毕 | Africa/非洲 | the Nairobi River/内罗毕河 | the Masai Mara/马赛马拉
    Canada/加拿大 | Ottawa/渥太华 | North America/北美洲 | the Ottawa River/渥太华河 | Niagara Falls/尼亚加拉瀑布
    the United States/美国 | Washington/华盛顿 | North America/北美洲 | the Potomac/波托马克河 | the White House/白宫
    Argentina/阿根廷 | Buenos Aires/布宜诺斯艾利斯 | South America/南美洲 | the Plata/拉普拉塔河 | the Obelisk/方尖碑
    Peru/秘鲁 | Lima/利马 | South America/南美洲 | the Rimac/里马克河 | Machu Picchu/马丘比丘
    Chile/智利 | Santiago/圣地亚哥 | South America/南美洲 | the Mapocho/马波乔河 | Easter Island/复活节岛
    Australia/澳大利亚 | Canberra/堪培拉 | Oceania/大洋洲 | the Molonglo/莫朗格洛河 | the Sydney Opera House/悉尼歌剧院
    """,
)

ANIMALS = _table(
    "animal food home sound legs",
    """
    cows/牛 | grass/草 | on farms/农场里 | moo/哞哞 | four/四
    cats/猫 | fish/鱼 | in houses/屋子里 | meow/喵喵 | four/四
    dogs/狗 | meat/肉 | in kennels/狗窝里 | woof/汪汪 | four/四
    horses/马 | hay/干草 | in stables/马厩里 | neigh/咴咴 | four/四
    sheep/绵羊 | grass/草 | in meadows/草地上 | baa/咩咩 | four/四
    pigs/猪 | corn/玉米 | in sties/猪圈里 | oink/哼哼 | four/四
    ducks/鸭子 | water plants/水草 | by ponds/池塘边 | quack/嘎嘎 | two/两
    hens/母鸡 | grain/谷子 | in coops/鸡舍里 | cluck/咯咯 | two/两
    frogs/青蛙 | insects/昆虫 | by ponds/池塘边 | croak/呱呱 | four/四
    owls/猫头鹰 | mice/老鼠 | in hollow trees/树洞里 | hoot/咕咕 | two/两
    bees/蜜蜂 | nectar/花蜜 | in hives/蜂巢里 | buzz/嗡嗡 | six/六
    mice/老鼠 | grain/谷子 | in holes/地洞里 | squeak/吱吱 | four/四
    wolves/狼 | meat/肉 | in forests/森林里 | howl/嗷嗷 | four/四
    snakes/蛇 | mice/老鼠 | under rocks/石头下 | hiss/嘶嘶 | -
    lions/狮子 | meat/肉 | on the savanna/草原上 | roar/吼吼 | four/四
    pandas/熊猫 | bamboo/竹子 | in bamboo forests/竹林里 | - | four/四
    rabbits/兔子 | carrots/胡萝卜 | in burrows/洞穴里 | - | four/四
    bears/熊 | honey/蜂蜜 | in caves/山洞里 | - | four/四
    monkeys/猴子 | bananas/香蕉 | in trees/树上 | - | -
    camels/骆驼 | thorn bushes/骆驼刺 | in deserts/沙漠里 | - | four/四
    penguins/企鹅 | fish/鱼 | in Antarctica/南极 | - | two/两
    spiders/蜘蛛 | flies/苍蝇 | in webs/网上 | - | eight/八
    whales/鲸 | krill/磷虾 | in the ocean/海洋里 | - | -
    squirrels/松鼠 | nuts/坚果 | in trees/树上 | - | four/四
    giraffes/长颈鹿 | leaves/树叶 | on the savanna/草原上 | - | four/四
    """,
)

TOOLS = _table(
    "tool use",
    """
    an umbrella/雨伞 | keep off the rain/挡雨
    a key/钥匙 | open locks/开锁
    a clock/钟 | tell the time/看时间
    a knife/刀 | cut things/切东西
    a pen/笔 | write words/写字
    a broom/扫帚 | sweep the floor/扫地
    a bed/床 | sleep at night/睡觉
    a lamp/灯 | give light/照明
    a bridge/桥 | cross a river/过河
    a telescope/望远镜 | look at the stars/看星星
    a fridge/冰箱 | keep food cold/冷藏食物
    a needle/针 | sew clothes/缝衣服
    a kettle/水壶 | boil water/烧水
    a map/地图 | find the way/找路
    a mirror/镜子 | see yourself/照自己
    soap/肥皂 | wash your hands/洗手
    """,
)

JOBS = _table(
    "job work",
    """
    a doctor/医生 | heals the sick/给人看病
    a teacher/老师 | teaches children/教学生
    a farmer/农民 | grows food/种庄稼
    a cook/厨师 | makes meals/做菜
    a pilot/飞行员 | flies planes/开飞机
    a baker/面包师 | bakes bread/烤面包
    a painter/画家 | paints pictures/画画
    a tailor/裁缝 | sews clothes/做衣服
    a firefighter/消防员 | puts out fires/灭火
    a fisherman/渔夫 | catches fish/捕鱼
    a dentist/牙医 | looks after teeth/看牙
    a writer/作家 | writes books/写书
    a postman/邮递员 | delivers letters/送信
    a builder/建筑工人 | builds houses/盖房子
    """,
)

THINGS = _table(
    "thing meaning",
    """
    an island/岛 | land with water all around it/四面环水的陆地
    a desert/沙漠 | a dry land with little rain/雨水很少的干旱土地
    a volcano/火山 | a mountain that throws out fire/会喷火的山
    a forest/森林 | a place with many trees/长着许多树的地方
    a library/图书馆 | a place with many books/藏着许多书的地方
    a school/学校 | a place where children learn/孩子们学习的地方
    a hospital/医院 | a place where the sick are healed/给病人治病的地方
    a museum/博物馆 | a place that shows old things/展出古物的地方
    ice/冰 | water that is frozen/冻住的水
    steam/水蒸气 | water that has become a gas/变成气体的水
    a dictionary/词典 | a book that explains words/解释词语的书
    a triangle/三角形 | a shape with three sides/有三条边的图形
    a lake/湖 | water with land all around it/四周是陆地的水
    dawn/黎明 | the time when the sun rises/太阳升起的时候
    """,
)

COLOURS = _table(
    "thing colour",
    """
    snow/雪 | white/白色
    coal/煤 | black/黑色
    grass/草 | green/绿色
    the sky/天空 | blue/蓝色
    blood/血 | red/红色
    a banana/香蕉 | yellow/黄色
    a carrot/胡萝卜 | orange/橙色
    a violet/紫罗兰 | purple/紫色
    chocolate/巧克力 | brown/棕色
    an elephant/大象 | grey/灰色
    a flamingo/火烈鸟 | pink/粉色
    milk/牛奶 | white/白色
    a tomato/西红柿 | red/红色
    a lemon/柠檬 | yellow/黄色
    the sea/大海 | blue/蓝色
    a crow/乌鸦 | black/黑色
    a cucumber/黄瓜 | green/绿色
    """,
)

COUNTS = _table(
    "whole number part",
    """
    a week/一个星期 | seven/七 | days/天
    a year/一年 | twelve/十二 | months/个月
    a day/一天 | twenty-four/二十四 | hours/个小时
    an hour/一小时 | sixty/六十 | minutes/分钟
    a minute/一分钟 | sixty/六十 | seconds/秒
    a century/一个世纪 | one hundred/一百 | years/年
    a square/一个正方形 | four/四 | sides/条边
    a hand/一只手 | five/五 | fingers/根手指
    a rainbow/一道彩虹 | seven/七 | colours/种颜色
    a bicycle/一辆自行车 | two/两 | wheels/个轮子
    a car/一辆汽车 | four/四 | wheels/个轮子
    a guitar/一把吉他 | six/六 | strings/根弦
    """,
)

DAYS = _cycle(
    "day next",
    "Monday/星期一 Tuesday/星期二 Wednesday/星期三 Thursday/星期四 Friday/星期五 Saturday/星期六 Sunday/星期日",
)

MONTHS = _cycle(
    "month next",
    "January/一月 February/二月 March/三月 April/四月 May/五月 June/六月 July/七月 August/八月 September/九月 "
    "October/十月 November/十一月 December/十二月",
)

SEASONS = _cycle("season next", "spring/春天 summer/夏天 autumn/秋天 winter/冬天")

OPPOSITES = _both_ways(
    "word opposite",
    "hot/热-cold/冷 big/大-small/小 long/长-short/短 high/高-low/低 fast/快-slow/慢 old/旧-new/新 wet/湿-dry/干 "
    "heavy/重-light/轻 full/满-empty/空 open/开-closed/关 early/早-late/晚 rich/富-poor/穷 left/左-right/右 "
    "day/白天-night/黑夜 up/上-down/下 happy/高兴-sad/难过",
)

WORDS = _translations(
    "word translation",
    "sun/太阳 moon/月亮 water/水 fire/火 tree/树 flower/花 book/书 door/门 hand/手 eye/眼睛 house/房子 rice/米饭 "
    "tea/茶 bread/面包 friend/朋友 mountain/山 rain/雨 wind/风 star/星星 bird/鸟 mother/妈妈 father/爸爸 "
    "apple/苹果 road/路",
)

SUMS = _rows("a b total", [[f"{n}/{n}" for n in (a, b, a + b)] for a in range(1, 10) for b in range(1, 10)])

RELATIONS = (
    Relation(
        "capital", COUNTRIES, "country", "capital",
        en=Phrasing(
            (
                "The capital of {country} is {capital}.",
                "{capital} is the capital of {country}.",
                "{country} has its capital in {capital}.",
                "The capital city of {country} is called {capital}.",
                "The government of {country} sits in {capital}.",
            ),
            (
                "What is the capital of {country}?",
                "Which city is the capital of {country}?",
                "What is the capital city of {country} called?",
                "Can you name the capital of {country}?",
                "Where does the government of {country} sit?",
            ),
            "And what is its capital?",
        ),
        zh=Phrasing(
            (
                "{country}的首都是{capital}。",
                "{capital}是{country}的首都。",
                "{country}把首都设在{capital}。",
                "{country}的首都叫{capital}。",
                "{country}的政府设在{capital}。",
            ),
            (
                "{country}的首都是哪里？",
                "{country}的首都是哪座城市？",
                "哪座城市是{country}的首都？",
                "{country}的首都叫什么？",
                "{country}的政府设在哪里？",
            ),
            "它的首都是哪里？",
        ),
    ),
    Relation(
        "continent", COUNTRIES, "country", "continent",
        en=Phrasing(
            (
                "{country} is in {continent}.",
                "{country} lies in {continent}.",
                "{country} is a country in {continent}.",
                "The continent of {country} is {continent}.",
                "On the map you find {country} in {continent}.",
            ),
            (
                "Which continent is {country} in?",
                "On which continent does {country} lie?",
                "What continent does {country} belong to?",
                "In which part of the world is {country}?",
                "Where on the map do I find {country}?",
            ),
            "And which continent is it in?",
        ),
        zh=Phrasing(
            (
                "{country}在{continent}。",
                "{country}位于{continent}。",
                "{country}是{continent}的国家。",
                "{continent}有一个国家叫{country}。",
                "在地图上，{country}属于{continent}。",
            ),
            (
                "{country}在哪个洲？",
                "{country}位于哪个洲？",
                "{country}属于哪个大洲？",
                "哪个洲有{country}？",
                "在地图上，{country}在哪个洲？",
            ),
            "它在哪个洲？",
        ),
    ),
    Relation(
        "sight", COUNTRIES, "country", "sight",
        en=Phrasing(
            (
                "{country} is known for {sight}.",
                "{country} is famous for {sight}.",
                "Travellers go to {country} to see {sight}.",
                "When people think of {country}, they think of {sight}.",
                "You can visit {sight} in {country}.",
            ),
            (
                "What is {country} known for?",
                "What is {country} famous for?",
                "What do travellers go to see in {country}?",
                "What do people think of when they think of {country}?",
                "What can I visit in {country}?",
            ),
            "And what is it known for?",
        ),
        zh=Phrasing(
            (
                "{country}以{sight}闻名。",
                "{country}最有名的是{sight}。",
                "说到{country}，人们会想到{sight}。",
                "人们去{country}看{sight}。",
                "在{country}可以参观{sight}。",
            ),
            (
                "{country}以什么闻名？",
                "{country}最有名的是什么？",
                "说到{country}，人们会想到什么？",
                "人们去{country}看什么？",
                "在{country}可以参观什么？",
            ),
            "它以什么闻名？",
        ),
    ),
    Relation(
        "country", COUNTRIES, "capital", "country",
        en=Phrasing(
            (
                "{capital} is in {country}.",
                "{capital} is a city in {country}.",
                "The city of {capital} lies in {country}.",
                "{capital} belongs to {country}.",
                "If you are in {capital}, you are in {country}.",
            ),
            (
                "Which country is {capital} in?",
                "In which country does {capital} lie?",
                "What country does {capital} belong to?",
                "Of which country is {capital} the capital?",
                "If I am in {capital}, which country am I in?",
            ),
            "And which country is it in?",
        ),
        zh=Phrasing(
            (
                "{capital}在{country}。",
                "{capital}是{country}的城市。",
                "{capital}位于{country}。",
                "{country}有一座城市叫{capital}。",
                "到了{capital}，就到了{country}。",
            ),
            (
                "{capital}在哪个国家？",
                "{capital}是哪个国家的城市？",
                "{capital}位于哪个国家？",
                "{capital}是哪个国家的首都？",
                "到了{capital}，就到了哪个国家？",
            ),
            "它在哪个国家？",
        ),
    ),
    Relation(
        "river", COUNTRIES, "capital", "river",
        en=Phrasing(
            (
                "{capital} lies on {river}.",
                "{river} flows through {capital}.",
                "The river of {capital} is {river}.",
                "In {capital} you can walk along {river}.",
                "The bridges of {capital} cross {river}.",
            ),
            (
                "On which river does {capital} lie?",
                "Which river flows through {capital}?",
                "What is the river of {capital} called?",
                "Along which river can I walk in {capital}?",
                "What do the bridges of {capital} cross?",
            ),
            "And on which river does it lie?",
        ),
        zh=Phrasing(
            (
                "{capital}在{river}边。",
                "{river}流过{capital}。",
                "流过{capital}的河是{river}。",
                "在{capital}可以沿着{river}散步。",
                "{capital}的桥架在{river}上。",
            ),
            (
                "{capital}在哪条河边？",
                "哪条河流过{capital}？",
                "流过{capital}的河叫什么？",
                "在{capital}可以沿着哪条河散步？",
                "{capital}的桥架在哪条河上？",
            ),
            "它在哪条河边？",
        ),
    ),
    Relation(
        "food", ANIMALS, "animal", "food",
        en=Phrasing(
            (
                "{animal} eat {food}.",
                "{animal} like to eat {food}.",
                "{animal} feed on {food}.",
                "The food of {animal} is {food}.",
                "Give {animal} some {food} and they are happy.",
            ),
            (
                "What do {animal} eat?",
                "What do {animal} like to eat?",
                "What do {animal} feed on?",
                "What is the food of {animal}?",
                "What should I give {animal} to eat?",
            ),
            "And what do they eat?",
        ),
        zh=Phrasing(
            (
                "{animal}吃{food}。",
                "{animal}喜欢吃{food}。",
                "{animal}以{food}为食。",
                "{animal}的食物是{food}。",
                "给{animal}一些{food}，它就高兴。",
            ),
            (
                "{animal}吃什么？",
                "{animal}喜欢吃什么？",
                "{animal}以什么为食？",
                "{animal}的食物是什么？",
                "我该给{animal}吃什么？",
            ),
            "它吃什么？",
        ),
    ),
    Relation(
        "home", ANIMALS, "animal", "home",
        en=Phrasing(
            (
                "{animal} live {home}.",
                "You find {animal} {home}.",
                "{animal} make their home {home}.",
                "{animal} are at home {home}.",
                "Look for {animal} {home}.",
            ),
            (
                "Where do {animal} live?",
                "Where do you find {animal}?",
                "Where do {animal} make their home?",
                "Where are {animal} at home?",
                "Where should I look for {animal}?",
            ),
            "And where do they live?",
        ),
        zh=Phrasing(
            (
                "{animal}住在{home}。",
                "{animal}生活在{home}。",
                "{animal}的家在{home}。",
                "在{home}能找到{animal}。",
                "{animal}把家安在{home}。",
            ),
            (
                "{animal}住在哪里？",
                "{animal}生活在哪里？",
                "{animal}的家在哪里？",
                "在哪里能找到{animal}？",
                "{animal}把家安在哪里？",
            ),
            "它住在哪里？",
        ),
    ),
    Relation(
        "sound", ANIMALS, "animal", "sound",
        en=Phrasing(
            (
                "{animal} say {sound}.",
                "{animal} go {sound}.",
                "The sound of {animal} is {sound}.",
                "When {animal} call, you hear {sound}.",
                "{sound} is what {animal} say.",
            ),
            (
                "What do {animal} say?",
                "What sound do {animal} make?",
                "What is the sound of {animal}?",
                "What do you hear when {animal} call?",
                "How do {animal} go?",
            ),
            "And what do they say?",
        ),
        zh=Phrasing(
            (
                "{animal}的叫声是{sound}。",
                "{animal}叫起来是{sound}。",
                "{animal}会{sound}叫。",
                "{sound}是{animal}的叫声。",
                "听到{sound}，就知道是{animal}。",
            ),
            (
                "{animal}的叫声是什么？",
                "{animal}叫起来是什么声音？",
                "{animal}怎么叫？",
                "{animal}会怎么叫？",
                "{animal}发出什么声音？",
            ),
            "它怎么叫？",
        ),
    ),
    Relation(
        "legs", ANIMALS, "animal", "legs",
        en=Phrasing(
            (
                "{animal} have {legs} legs.",
                "{animal} walk on {legs} legs.",
                "All {animal} have {legs} legs.",
                "You can count {legs} legs on {animal}.",
            ),
            (
                "How many legs do {animal} have?",
                "On how many legs do {animal} walk?",
                "How many legs can you count on {animal}?",
                "Do you know how many legs {animal} have?",
            ),
            "And how many legs do they have?",
        ),
        zh=Phrasing(
            (
                "{animal}有{legs}条腿。",
                "{animal}用{legs}条腿走路。",
                "{animal}长着{legs}条腿。",
                "数一数，{animal}有{legs}条腿。",
            ),
            (
                "{animal}有几条腿？",
                "{animal}用几条腿走路？",
                "{animal}长着几条腿？",
                "数一数，{animal}有几条腿？",
            ),
            "它有几条腿？",
        ),
    ),
    Relation(
        "use", TOOLS, "tool", "use",
        en=Phrasing(
            (
                "{tool} is used to {use}.",
                "You use {tool} to {use}.",
                "With {tool} you can {use}.",
                "{tool} helps you to {use}.",
                "People need {tool} to {use}.",
            ),
            (
                "What is {tool} used for?",
                "What do you use {tool} for?",
                "What can I do with {tool}?",
                "What does {tool} help you to do?",
                "Why do people need {tool}?",
            ),
        ),
        zh=Phrasing(
            (
                "{tool}用来{use}。",
                "人们用{tool}{use}。",
                "有了{tool}就能{use}。",
                "{tool}的用处是{use}。",
                "想要{use}，就用{tool}。",
            ),
            (
                "{tool}用来做什么？",
                "人们用{tool}做什么？",
                "有了{tool}能做什么？",
                "{tool}的用处是什么？",
                "{tool}有什么用？",
            ),
        ),
    ),
    Relation(
        "work", JOBS, "job", "work",
        en=Phrasing(
            (
                "{job} {work}.",
                "{job} is someone who {work}.",
                "{job} is a person who {work}.",
                "Every day {job} {work}.",
            ),
            (
                "What does {job} do?",
                "What is the work of {job}?",
                "What does {job} do every day?",
                "What kind of person is {job}?",
            ),
        ),
        zh=Phrasing(
            (
                "{job}的工作是{work}。",
                "{job}{work}。",
                "{job}是{work}的人。",
                "{job}每天{work}。",
            ),
            (
                "{job}的工作是什么？",
                "{job}做什么？",
                "{job}是做什么的？",
                "{job}每天做什么？",
            ),
        ),
    ),
    Relation(
        "job", JOBS, "work", "job",
        en=Phrasing(
            (
                "The one who {work} is {job}.",
                "Someone who {work} is called {job}.",
                "It is {job} who {work}.",
                "The person who {work} is {job}.",
            ),
            (
                "Who {work}?",
                "What do you call someone who {work}?",
                "Who is it that {work}?",
                "What is the person who {work} called?",
            ),
        ),
        zh=Phrasing(
            (
                "{work}的人是{job}。",
                "{work}的人叫{job}。",
                "{work}是{job}的工作。",
                "负责{work}的是{job}。",
            ),
            (
                "{work}的人是谁？",
                "{work}的人叫什么？",
                "{work}是谁的工作？",
                "谁负责{work}？",
            ),
        ),
    ),
    Relation(
        "meaning", THINGS, "thing", "meaning",
        en=Phrasing(
            (
                "{thing} is {meaning}.",
                "In other words, {thing} is {meaning}.",
                "By {thing} we mean {meaning}.",
                "We say {thing} when we mean {meaning}.",
            ),
            (
                "What is {thing}?",
                "In other words, what is {thing}?",
                "What do we mean by {thing}?",
                "Can you explain what {thing} is?",
            ),
        ),
        zh=Phrasing(
            (
                "{thing}是{meaning}。",
                "{thing}就是{meaning}。",
                "{meaning}叫做{thing}。",
                "我们把{meaning}叫做{thing}。",
            ),
            (
                "{thing}是什么？",
                "什么是{thing}？",
                "什么叫做{thing}？",
                "请解释一下{thing}是什么？",
            ),
        ),
    ),
    Relation(
        "colour", COLOURS, "thing", "colour",
        en=Phrasing(
            (
                "{thing} is {colour}.",
                "The colour of {thing} is {colour}.",
                "{thing} looks {colour}.",
                "To paint {thing}, take {colour}.",
            ),
            (
                "What colour is {thing}?",
                "What is the colour of {thing}?",
                "Which colour does {thing} have?",
                "Which colour do I take to paint {thing}?",
            ),
        ),
        zh=Phrasing(
            (
                "{thing}是{colour}的。",
                "{thing}的颜色是{colour}。",
                "{thing}看起来是{colour}的。",
                "画{thing}要用{colour}。",
            ),
            (
                "{thing}是什么颜色的？",
                "{thing}的颜色是什么？",
                "{thing}看起来是什么颜色？",
                "画{thing}要用什么颜色？",
            ),
        ),
    ),
    Relation(
        "number", COUNTS, "whole", "number",
        en=Phrasing(
            (
                "{whole} has {number} {part}.",
                "There are {number} {part} in {whole}.",
                "{number} {part} make up {whole}.",
                "You can count {number} {part} in {whole}.",
            ),
            (
                "How many {part} does {whole} have?",
                "How many {part} are there in {whole}?",
                "How many {part} make up {whole}?",
                "How many {part} can you count in {whole}?",
            ),
        ),
        zh=Phrasing(
            (
                "{whole}有{number}{part}。",
                "{whole}一共有{number}{part}。",
                "{whole}总共有{number}{part}。",
                "数一数，{whole}有{number}{part}。",
            ),
            (
                "{whole}有多少{part}？",
                "{whole}一共有多少{part}？",
                "{whole}总共有多少{part}？",
                "数一数，{whole}有多少{part}？",
            ),
        ),
    ),
    Relation(
        "day after", DAYS, "day", "next",
        en=Phrasing(
            (
                "The day after {day} is {next}.",
                "After {day} comes {next}.",
                "{day} is followed by {next}.",
                "If today is {day}, tomorrow is {next}.",
            ),
            (
                "Which day comes after {day}?",
                "What is the day after {day}?",
                "What follows {day}?",
                "If today is {day}, what is tomorrow?",
            ),
        ),
        zh=Phrasing(
            (
                "{day}的后一天是{next}。",
                "{day}过后是{next}。",
                "过了{day}就是{next}。",
                "今天是{day}，明天就是{next}。",
            ),
            (
                "{day}的后一天是星期几？",
                "{day}过后是星期几？",
                "过了{day}就是星期几？",
                "今天是{day}，明天是星期几？",
            ),
        ),
    ),
    Relation(
        "day before", DAYS, "next", "day",
        en=Phrasing(
            (
                "The day before {next} is {day}.",
                "Before {next} comes {day}.",
                "{next} follows {day}.",
                "If today is {next}, yesterday was {day}.",
            ),
            (
                "Which day comes before {next}?",
                "What is the day before {next}?",
                "What does {next} follow?",
                "If today is {next}, what was yesterday?",
            ),
        ),
        zh=Phrasing(
            (
                "{next}的前一天是{day}。",
                "{next}之前是{day}。",
                "还没到{next}的时候是{day}。",
                "今天是{next}，昨天就是{day}。",
            ),
            (
                "{next}的前一天是星期几？",
                "{next}之前是星期几？",
                "还没到{next}的时候是星期几？",
                "今天是{next}，昨天是星期几？",
            ),
        ),
    ),
    Relation(
        "month after", MONTHS, "month", "next",
        en=Phrasing(
            (
                "The month after {month} is {next}.",
                "After {month} comes {next}.",
                "{month} is followed by {next}.",
                "When {month} is over, {next} begins.",
            ),
            (
                "Which month comes after {month}?",
                "What is the month after {month}?",
                "Which month follows {month}?",
                "Which month begins when {month} is over?",
            ),
        ),
        zh=Phrasing(
            (
                "{month}的下一个月是{next}。",
                "{month}过后是{next}。",
                "过了{month}就是{next}。",
                "{month}结束了，{next}就开始了。",
            ),
            (
                "{month}的下一个月是几月？",
                "{month}过后是几月？",
                "过了{month}就是几月？",
                "{month}结束了，几月就开始了？",
            ),
        ),
    ),
    Relation(
        "season after", SEASONS, "season", "next",
        en=Phrasing(
            (
                "The season after {season} is {next}.",
                "After {season} comes {next}.",
                "{season} is followed by {next}.",
                "When {season} is over, {next} begins.",
            ),
            (
                "Which season comes after {season}?",
                "What is the season after {season}?",
                "Which season follows {season}?",
                "Which season begins when {season} is over?",
            ),
        ),
        zh=Phrasing(
            (
                "{season}的下一个季节是{next}。",
                "{season}过后是{next}。",
                "过了{season}就是{next}。",
                "{season}结束了，{next}就开始了。",
            ),
            (
                "{season}的下一个季节是什么？",
                "{season}过后是什么季节？",
                "过了{season}就是什么季节？",
                "{season}结束了，什么季节就开始了？",
            ),
        ),
    ),
    Relation(
        "opposite", OPPOSITES, "word", "opposite",
        en=Phrasing(
            (
                "The opposite of {word} is {opposite}.",
                "{word} is the opposite of {opposite}.",
                "{word} and {opposite} are opposites.",
                "What is not {word} is {opposite}.",
            ),
            (
                "What is the opposite of {word}?",
                "What is the contrary of {word}?",
                "Which word means the opposite of {word}?",
                "What do you call something that is not {word}?",
            ),
        ),
        zh=Phrasing(
            (
                "“{word}”的反义词是“{opposite}”。",
                "“{word}”和“{opposite}”是反义词。",
                "与“{word}”相反的是“{opposite}”。",
                "“{word}”的反面是“{opposite}”。",
            ),
            (
                "“{word}”的反义词是什么？",
                "“{word}”和什么是反义词？",
                "与“{word}”相反的是什么？",
                "“{word}”的反面是什么？",
            ),
        ),
    ),
    Relation(
        "translation", WORDS, "word", "translation",
        en=Phrasing(
            (
                "The Chinese word for {word} is {translation}.",
                "In Chinese, {word} is {translation}.",
                "{word} is called {translation} in Chinese.",
                "The Chinese say {translation} for {word}.",
            ),
            (
                "What is the Chinese word for {word}?",
                "What is {word} in Chinese?",
                "How do you say {word} in Chinese?",
                "What do the Chinese say for {word}?",
            ),
        ),
        zh=Phrasing(
            (
                "“{word}”的英语是 {translation}。",
                "“{word}”用英语说是 {translation}。",
                "英语里，“{word}”是 {translation}。",
                "“{word}”翻译成英语是 {translation}。",
            ),
            (
                "“{word}”的英语是什么？",
                "“{word}”用英语怎么说？",
                "英语里，“{word}”是什么？",
                "“{word}”翻译成英语是什么？",
            ),
        ),
    ),
    Relation(
        "sum", SUMS, "a", "total",
        en=Phrasing(
            (
                "{a} plus {b} is {total}.",
                "{a} + {b} = {total}.",
                "{a} and {b} make {total}.",
                "The sum of {a} and {b} is {total}.",
                "If you add {b} to {a}, you get {total}.",
            ),
            (
                "What is {a} plus {b}?",
                "What is {a} + {b}?",
                "How much is {a} and {b}?",
                "What is the sum of {a} and {b}?",
                "What do I get if I add {b} to {a}?",
            ),
        ),
        zh=Phrasing(
            (
                "{a}加{b}等于{total}。",
                "{a} + {b} = {total}。",
                "{a}加上{b}得{total}。",
                "{a}与{b}的和是{total}。",
                "把{a}和{b}加起来是{total}。",
            ),
            (
                "{a}加{b}等于几？",
                "{a} + {b} 等于几？",
                "{a}加上{b}得几？",
                "{a}与{b}的和是几？",
                "把{a}和{b}加起来是几？",
            ),
        ),
    ),
)  # fmt: skip
