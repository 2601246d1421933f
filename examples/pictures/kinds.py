# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The kinds of things that the scenes show: a character of Unicode for the drawing, a plain name, and a group."""

import unicodedata
from dataclasses import dataclass


IRREGULAR_PLURALS = {
    "blowfish": "blowfish", "deer": "deer", "die": "dice", "fish": "fish", "knife": "knives", "leaf": "leaves",
    "loaf": "loaves", "mouse": "mice", "ox": "oxen", "scarf": "scarves", "sheep": "sheep", "snowman": "snowmen",
    "tooth": "teeth", "wolf": "wolves",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of thing. `name` is a singular noun in lower case, such as "apple"; `group` such as "fruit"."""

    character: str
    name: str
    group: str

    @property
    def phrase(self) -> str:
        """The name with its indefinite article."""
        vowel = self.name[0] in "aeio" or self.name in ("hourglass", "umbrella")
        return f"{'an' if vowel else 'a'} {self.name}"

    @property
    def plural(self) -> str:
        """The name for two or more of them. In "slice of pizza" the word before "of" is counted."""
        counted, of, rest = self.name.partition(" of ")
        *before, word = counted.split()
        if word in IRREGULAR_PLURALS:
            word = IRREGULAR_PLURALS[word]
        elif word.endswith(("s", "sh", "ch", "x", "mango", "mosquito", "potato", "tomato", "volcano")):
            word += "es"
        elif word.endswith("y") and word[-2] not in "aeiou":
            word = f"{word[:-1]}ies"
        else:
            word += "s"
        return " ".join([*before, word]) + of + rest


# Per group the names in Unicode; `=` gives the plain name where it is not the one in Unicode without "face". Only what has a
# plain name is listed: no signs, faces, persons or gestures, and of things that are hard to tell apart, one.
NAMES = {
    "animal": """
        rat, mouse, ox, water buffalo=buffalo, cow, tiger, leopard, rabbit, cat, dragon, crocodile, whale, snail, snake,
        horse, ram, goat, sheep, monkey, rooster, chicken, dog, pig, boar, elephant, octopus, bug=caterpillar, ant,
        honeybee=bee, lady beetle=ladybug, fish, blowfish, turtle, hatching chick, baby chick=chick, bird, penguin,
        koala, dolphin, bactrian camel=camel, frog face, panda face, bear face, wolf face, hamster face,
        chipmunk=squirrel, spider, crab, lion face, scorpion, turkey, unicorn face, eagle, duck, bat, shark, owl, fox
        face, butterfly, deer, gorilla, lizard, rhinoceros=rhino, shrimp, squid, giraffe face, zebra face, hedgehog,
        sauropod=dinosaur, cricket, kangaroo, llama, peacock, hippopotamus=hippo, parrot, raccoon, lobster, mosquito,
        badger, swan, mammoth, sloth, otter, orangutan, skunk, flamingo, oyster, beaver, bison, seal, fly, worm, beetle,
        cockroach, dove of peace=dove
    """,
    "fruit": """
        grapes=bunch of grapes, melon, watermelon, tangerine=orange, lemon, banana, pineapple, red apple=apple, pear,
        peach, cherries=pair of cherries, strawberry, kiwifruit=kiwi, coconut, mango, blueberries=bunch of blueberries
    """,
    "vegetable": """
        mushroom, tomato, aubergine=eggplant, hot pepper=chili, ear of maize=corn cob, avocado, cucumber, potato,
        carrot, broccoli=broccoli head, garlic=garlic bulb, onion, olive, bell pepper, chestnut
    """,
    "food": """
        hamburger, slice of pizza, meat on bone=piece of meat, poultry leg=chicken leg, rice ball, spaghetti=plate of
        spaghetti, bread=loaf of bread, french fries=bag of fries, sushi=piece of sushi, soft ice cream=ice cream cone,
        doughnut=donut, cookie, chocolate bar, candy, lollipop, honey pot, shortcake=slice of cake, birthday cake, hot
        dog, taco, burrito, popcorn=box of popcorn, croissant, egg, pancakes=stack of pancakes, pie, pretzel, sandwich,
        bagel, cupcake, cheese wedge=piece of cheese, waffle, butter=piece of butter, dumpling, bacon=strip of bacon
    """,
    "drink": """
        hot beverage=cup of coffee, wine glass=glass of wine, cocktail glass=cocktail, beer mug=mug of beer, baby
        bottle, glass of milk, cup with straw=soda, teapot, bubble tea, bottle with popping cork=bottle of champagne
    """,
    "plant": """
        seedling, evergreen tree=fir tree, deciduous tree=tree, palm tree, cactus, tulip, rose, hibiscus, sunflower,
        four leaf clover=clover, maple leaf, bouquet, potted plant, christmas tree, lotus
    """,
    "vehicle": """
        rocket, helicopter, steam locomotive=train, tram, bus, ambulance, fire engine=fire truck, police car, taxi,
        automobile=car, delivery truck=truck, tractor, ship, rowboat, speedboat, bicycle, airplane, sailboat, scooter,
        motor scooter, canoe, flying saucer, racing car=race car, pickup truck, satellite, sled, parachute
    """,
    "building": """
        house building=house, hospital, school, factory, european castle=castle, church, tent, tokyo tower=tower, statue
        of liberty=statue, stadium, hotel, mosque, hut, ferris wheel, fountain, bridge at night=bridge, circus tent
    """,
    "clothing": """
        eyeglasses=pair of glasses, necktie=tie, t-shirt, jeans=pair of jeans, dress, kimono, bikini, handbag, purse,
        school satchel=backpack, athletic shoe=sneaker, high-heeled shoe=high heel, womans boots=boot, crown, top hat,
        graduation cap, scarf, gloves=pair of gloves, coat, socks=pair of socks, billed cap=cap, shorts=pair of shorts,
        womans hat=hat, ring, flat shoe, thong sandal=sandal
    """,
    "instrument": """
        saxophone, guitar, musical keyboard=piano, trumpet, violin, drum with drumsticks=drum, banjo, accordion,
        microphone
    """,
    "tool": """
        hammer, axe, carpentry saw=saw, screwdriver, wrench, ladder, broom, bucket, magnet, toolbox, plunger, razor,
        toothbrush, black scissors=pair of scissors, pencil, safety pin, sewing needle=needle, hook, pick=pickaxe, gear,
        key, sponge, fire extinguisher, nut and bolt=bolt, candle, electric torch=flashlight, umbrella on ground=parasol
    """,
    "sport": """
        soccer ball=football, baseball, basketball and hoop=basketball, tennis racquet and ball=tennis ball, volleyball,
        trophy, boxing glove, kite, yo-yo, skateboard, ice skate, roller skate, bow and arrow=bow, game die=die
    """,
    "thing": """
        watch, hourglass, alarm clock, black telephone=telephone, mobile phone, television, camera, personal
        computer=laptop, printer, radio, battery, electric light bulb=light bulb, open book=book, envelope, wrapped
        present=gift, balloon, teddy bear, chair, bed, door, toilet, bathtub, mirror, window, basket, shopping
        trolley=shopping cart, bell, anchor, umbrella, snowman without snow=snowman, bomb, pill, syringe, coin, bone,
        tooth, brain, crystal ball, gem stone=diamond, jack-o-lantern=pumpkin, compass, telescope, microscope, test
        tube, coffin, spoon, hocho=knife, amphora=vase, money bag, credit card, ticket, dna double helix=dna strand,
        feather, rock, brick, shield, volcano, rainbow, crescent moon=moon, black sun with rays=sun, cloud, white medium
        star=star, snowflake, fire, droplet=drop, black heart suit=heart, magic wand, robot face, alien monster, ghost,
        skull
    """,
}


def list_kinds() -> list[Kind]:
    """Returns all kinds, in the order of the table."""
    kinds = []
    for group, names in NAMES.items():
        for entry in names.split(","):
            unicode_name, _, name = " ".join(entry.split()).partition("=")
            character = unicodedata.lookup(unicode_name.upper())
            kinds.append(Kind(character, name or unicode_name.removesuffix(" face"), group))
    return kinds
