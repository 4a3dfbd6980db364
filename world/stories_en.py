"""The grammar of the stories in English; `world.stories` tells them."""

from __future__ import annotations

from world.grammar import Grammar, Plot, wordings

WHEN = wordings(
    "One day|One sunny morning|One spring morning|On a warm summer evening|One autumn afternoon|On a cold winter day|"
    "On Saturday morning|On Sunday afternoon|On market day|On the first day of the holidays"
)
OPENINGS = wordings(
    "{when}, {a} left {a_his} house {a_home} and felt very happy.|{when}, {a} the {a_species} went for a walk.|"
    "In Crescent Town, {a_home}, lived {a_kind} called {a}. {when}, {a_he} saw that the sky was very blue.|"
    "{when}, {a} the {a_job} had finished {a_his} work.|"
    "Do you know {a}? {a_He} is the {a_colour} {a_species} who lives {a_home}.|"
    "{when}, all was quiet in Crescent Town. Only {a} was awake."
)
ENDINGS = wordings(
    "That night {a} slept very well {a_home}.|What a happy day it was!|From then on they often played together.|"
    "{a} thought: it is good to have friends.|All the way home {a} was smiling.|"
    "In the evening {a} wrote it all down in {a_his} diary.|"
)
PLOTS = (
    Plot(
        "But when {a_he} came to {place}, {a_his} {bare} was gone.|But {a} could not find {a_his} {bare} anywhere./"
        '"Do not worry," said {b} the {b_job}, "we will look for it together."|'
        "{b} came from {b_his} house {b_home} to help./"
        "They looked everywhere, even in {place2}.|They looked under every tree and every stone./"
        "At last {b} found the {bare} under a bench.|In the end the {bare} was in {place2}./"
        "To say thank you, {a} gave {b} some {b_food}, because {b} likes {b_food} best.|"
        '"Thank you so much!" said {a}.',
    ),
    Plot(
        "It was {a}'s birthday, and many guests came.|Everybody came to {a}'s birthday party./"
        "{b} brought some {a_food}, because {a} likes {a_food} best.|"
        "The table was full of {a_food}, {a}'s favourite food./"
        '{c} gave {a} {thing}.|Then {c} came in with {thing}. "This is for you!" said {c}./'
        "{a_friend} is {a}'s best friend and gave {a} a big hug.|/"
        '"This is my best birthday ever," said {a}.|{a} closed {a_his} eyes and made a wish.',
    ),
    Plot(
        "{b}'s hobby is {b_hobby}, and {a} wanted to learn it too.|"
        "Near the house {b_home}, {a} saw {b} {b_hobby}. It looked like fun./"
        '"Will you teach me?" asked {a}. "Of course!" said {b}.|{b} was happy to teach {a}./'
        "At first it was very hard.|On the first day everything went wrong./"
        '"Try again," said {b} kindly.|{b} showed it again and again./'
        "After many days {a} could do it well.|Day by day {a} got better./"
        "But {a}'s own hobby is still {a_hobby}.|Now they often meet {b_home}.|",
    ),
    Plot(
        "{a} wanted to visit {b}, who lives {b_home}.|"
        "{a} took some {b_food} and went to see {b}, who lives {b_home}./"
        "On the way {a} met {c} the {c_species}.|Near {place} {a} met {c}, who works as {c_a_job}./"
        '"I am going to see {b}," said {a}. "Have a good trip!" said {c}.|{c} showed {a} a short way./'
        "When {a} arrived, {b} was {b_hobby}.|{a} knocked, and {b} opened the door./"
        '"You brought {b_food}! I like {b_food} best," said {b}.|They ate {b_food} together, {b}\'s favourite food.',
    ),
    Plot(
        "That day a strong wind broke the roof of a house near {place}.|"
        "After the heavy rain a small bridge was gone./"
        "{a} works as {a_a_job} and {a_deed}, but now {a_he} helped too.|{a} the {a_job} came running to help./"
        "{b} brought wood from {b_his} house {b_home}.|{b} and {c} came with hammers and nails./"
        "They worked all day long.|Nobody stopped before the work was done./"
        '"Together we can do anything," said {a}.|The mayor gave {a} {thing} to say thank you.',
    ),
    Plot(
        "{a} asked {b} and {c} to come to a picnic.|The weather was fine, so {a}, {b} and {c} had a picnic./"
        "{a} brought {a_food}, {b} brought {b_food}, and {c} brought {c_food}. Each brought what they like best.|"
        "{a} likes {a_food} best, {b} likes {b_food} best, and {c} likes {c_food} best, so the basket was full./"
        "They sat down on the grass near {place}.|On the way they bought some tea./"
        "Later {a} enjoyed {a_hobby}, and {b} enjoyed {b_hobby}.|{b} told them about life {b_home}./"
        '"Let us do this again!" said {c}.|They went home when the sun went down.',
    ),
    Plot(
        "{a} planted a seed near {a_his} house {a_home}.|{c} gave {a} a seed, and {a} planted it {a_home}./"
        "Every morning {a_he} gave it some water.|{a} thought of it all day, even while {a_hobby}./"
        "After many days a small green leaf came up.|When spring came, the seed began to grow./"
        "Then it had a flower, and the flower was {a_colour}.|In the end there was a flower, and it was {a_colour}./"
        '"{a}, it is {a_colour}, just like you!" said {b}.|{b} came from {b_his} house {b_home} to see it.',
    ),
)
GRAMMAR = Grammar(WHEN, OPENINGS, ENDINGS, PLOTS)
