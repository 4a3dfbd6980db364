"""The generated demo corpus: Crescent Town (月牙镇), a small bilingual world that a small model can learn in minutes.

    python -m world --out data/demo [--seed 0] [--scale 1.0]        python -m world --preview

Four in five characters are Chinese. The words and sentences stand in the YAML files, and the code puts them together.
What is held out, and how, is explained in `cast.World` (facts), `numbers` and `text.chats.arithmetic` (numbers),
`words` (classes, opposites) and `cast.reserved` (the rest).
"""
