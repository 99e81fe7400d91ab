"""Curation of the world's subjects: sets and libraries, which emoji are kept, what they are.

Labels are emojibase's; `world_nouns.py` says what they are called. Left out: signs, flags, arrows,
clock-face series, skin tones, logos.
"""

# Style words of the captions; a set missing here is not used. All licences allow redistribution.
EMOJI_SETS = {
    "fluent-emoji-3d": {"style": "3d render", "licence": "MIT"},
    "noto": {"style": "drawing", "licence": "Apache-2.0"},
    "twemoji": {"style": "flat icon", "licence": "CC-BY 4.0"},
    "fluent-emoji-flat": {"style": "flat icon", "licence": "MIT"},
    "noto-v1": {"style": "cartoon", "licence": "Apache-2.0"},
}

# libraries of the furniture package
LIBRARY_LICENCE = {
    "BlendSwap-CC-0": "CC0 1.0",
    "BlendSwap-CC-BY": "CC-BY 3.0",
    "KatorLegaz": "CC-BY 3.0 US",
    "Reallusion": "CC-BY 3.0 US",
    "Scopia": "CC-BY 3.0",
}

# subgroup of emojibase -> category; every label of it is kept unless it is in DROPPED
SUBGROUPS = {
    "face-costume": "character",
    "monkey-face": "animal",
    "person-fantasy": "person",
    "animal-mammal": "animal",
    "animal-bird": "animal",
    "animal-amphibian": "animal",
    "animal-reptile": "animal",
    "animal-marine": "animal",
    "animal-bug": "animal",
    "plant-flower": "plant",
    "plant-other": "plant",
    "food-fruit": "food",
    "food-vegetable": "food",
    "food-prepared": "food",
    "food-asian": "food",
    "food-sweet": "food",
    "drink": "food",
    "dishware": "object",
    "place-building": "building",
    "place-other": "building",
    "transport-ground": "vehicle",
    "transport-water": "vehicle",
    "transport-air": "vehicle",
    "hotel": "object",
    "event": "object",
    "award-medal": "object",
    "sport": "object",
    "game": "toy",
    "arts-crafts": "object",
    "clothing": "clothing",
    "music": "object",
    "musical-instrument": "instrument",
    "light-video": "object",
    "book-paper": "object",
    "tool": "object",
    "science": "object",
    "medical": "object",
    "household": "object",
}

# further single labels, with their category
EXTRA = {
    "skull": "object",
    "grinning cat": "animal",
    "grinning face": "face",
    "winking face": "face",
    "smiling face with sunglasses": "face",
    "crying face": "face",
    "sleeping face": "face",
    "angry face": "face",
    "nerd face": "face",
    "cowboy hat face": "face",
    "partying face": "face",
    "astonished face": "face",
    "thinking face": "face",
    "face with tongue": "face",
    "smiling face with heart-eyes": "face",
    "nauseated face": "face",
    "cold face": "face",
    "face with monocle": "face",
    "disguised face": "face",
    "smiling face with halo": "face",
    "baby": "person",
    "boy": "person",
    "girl": "person",
    "man": "person",
    "man: beard": "person",
    "man: red hair": "person",
    "man: curly hair": "person",
    "man: white hair": "person",
    "man: bald": "person",
    "woman": "person",
    "woman: red hair": "person",
    "woman: curly hair": "person",
    "woman: white hair": "person",
    "woman: blond hair": "person",
    "man: blond hair": "person",
    "woman standing": "person",
    "man standing": "person",
    "old man": "person",
    "old woman": "person",
    "cook": "person",
    "farmer": "person",
    "judge": "person",
    "scientist": "person",
    "singer": "person",
    "artist": "person",
    "pilot": "person",
    "astronaut": "person",
    "firefighter": "person",
    "police officer": "person",
    "detective": "person",
    "ninja": "person",
    "construction worker": "person",
    "prince": "person",
    "princess": "person",
    "student": "person",
    "woman dancing": "person",
    "man dancing": "person",
    "snowboarder": "person",
    "woman teacher": "person",
    "woman health worker": "person",
    "man mechanic": "person",
    "man walking": "person",
    "woman walking": "person",
    "red heart": "object",
    "blue heart": "object",
    "brain": "object",
    "eye": "object",
    "tooth": "object",
    "bone": "object",
    "ear": "object",
    "nose": "object",
    "mouth": "object",
    "foot": "object",
    "raised hand": "object",
    "thumbs up": "object",
    "compass": "object",
    "volcano": "building",
    "watch": "object",
    "alarm clock": "object",
    "stopwatch": "object",
    "mantelpiece clock": "object",
    "hourglass done": "object",
    "crescent moon": "sky",
    "full moon": "sky",
    "sun": "sky",
    "sun with face": "sky",
    "ringed planet": "sky",
    "star": "sky",
    "cloud": "sky",
    "cloud with lightning": "sky",
    "tornado": "sky",
    "rainbow": "sky",
    "umbrella": "object",
    "closed umbrella": "object",
    "snowflake": "sky",
    "snowman": "toy",
    "snowman without snow": "toy",
    "comet": "sky",
    "fire": "sky",
    "droplet": "sky",
    "globe showing Americas": "sky",
    "thermometer": "object",
    "new moon face": "sky",
    "megaphone": "object",
    "bell": "object",
    "postal horn": "instrument",
    "telephone": "object",
    "battery": "object",
    "laptop": "object",
    "desktop computer": "object",
    "printer": "object",
    "computer mouse": "object",
    "floppy disk": "object",
    "optical disk": "object",
    "keyboard": "object",
    "abacus": "object",
    "money bag": "object",
    "coin": "object",
    "envelope": "object",
    "package": "object",
    "postbox": "object",
    "closed mailbox with raised flag": "object",
    "pencil": "object",
    "pen": "object",
    "paintbrush": "object",
    "crayon": "object",
    "fountain pen": "object",
    "briefcase": "object",
    "file folder": "object",
    "calendar": "object",
    "pushpin": "object",
    "paperclip": "object",
    "straight ruler": "object",
    "scissors": "object",
    "wastebasket": "object",
    "file cabinet": "object",
    "clipboard": "object",
    "locked": "object",
    "key": "object",
    "old key": "object",
    "moai": "object",
    "coffin": "object",
    "funeral urn": "object",
}

DROPPED = set(
    """
pile of poo|ogre|goblin|Mx Claus|man superhero|woman superhero|man supervillain|woman supervillain
man mage|woman mage|man fairy|woman fairy|man vampire|woman vampire|merperson|man elf|woman elf
man genie|woman genie|man zombie|woman zombie|baby angel|hear-no-evil monkey|speak-no-evil monkey
guide dog|service dog|pig nose|paw prints|microbe|spider web|fly|cockroach|feather|wing|empty nest
white flower|rosette|wilted flower|leaf fluttering in wind|fallen leaf|fish cake with swirl
cooking|curry rice|oden|dango|ice|pouring liquid|clinking beer mugs|clinking glasses
sheaf of rice|fork and knife|building construction|houses|Japanese post office|love hotel|hotel
Tokyo tower|Statue of Liberty|wedding|bank|foggy|night with stars|cityscape|sunrise over mountains
sunrise|cityscape at dusk|sunset|bridge at night|hot springs|rock|derelict house|post office
hospital|convenience store|department store|stadium|metro|light rail|station|mountain railway
oncoming bus|oncoming police car|oncoming taxi|oncoming automobile|manual wheelchair
motorized wheelchair|bus stop|motorway|railway track|stop sign|construction|trolleybus|tram car
airplane departure|airplane arrival|seat|mountain cableway|aerial tramway|high-speed train
horizontal traffic light|police car light|ferry|ship|fireworks|sparkles|tanabata tree
moon viewing ceremony|admission tickets|ticket|reminder ribbon|2nd place medal|3rd place medal
cricket game|field hockey|lacrosse|softball|pine decoration|red envelope|military medal
running shirt|ribbon|joker|mahjong red dragon|flower playing cards|spade suit|heart suit
diamond suit|club suit|chess pawn|sewing needle|knot|performing arts|briefs|bikini|sari|shorts
prayer beads|shopping bags|clutch bag|musical score|musical note|musical notes|level slider
control knobs|film frames|clapper board|camera with flash|dvd|page with curl|page facing up
magnifying glass tilted right|bookmark tabs|bookmark|label|green book|blue book|orange book|ledger
rolled-up newspaper|notebook with decorative cover|hammer and pick|hammer and wrench
crossed swords|pick|white cane|link|broken chain|chains|dna|drop of blood|x-ray|petri dish|syringe
pill|adhesive bandage|elevator|mirror|window|door|plunger|shower|mouse trap|safety pin|bubbles
hair pick|thong sandal|woman’s sandal|goggles|martial arts uniform|goal net
one-piece swimsuit|slot machine|bullseye|lotion bottle|folding hand fan|root vegetable
skull and crossbones|beans|locked with pen|video game|hairy creature|unlocked
bento box|shinto shrine|suspension railway|carp streamer|wind chime|nut and bolt|clamp
bellhop bell|sparkler|brick|wood|roll of paper|canned food|flatbread|tamale|stuffed flatbread
rice cracker|cooked rice|mate|squid|worm|scorpion|hatching chick
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
