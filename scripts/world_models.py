"""Curation of the 3D models: which are kept and what they are called.

A model counts when its catalogue name (or LIBRARY/ID) stands behind a noun; the noun is the emoji's
where it is the same thing. Left out: brands, building parts, sockets, road marks, cabinets.
"""

# noun: catalogue names, or LIBRARY/ID where the name alone is too wide
_NAMES = {
    "furniture": """
armchair: Armchair, Winchester armchair, Modern armchair, Armchair ottoman, Rattan armchair
bed: Bed, Child bed, Iron bed, Mezzanine bed, Day bed, Captain's bed, Hospital bed
bunk bed: Bunk bed
crib: Crib, Baby bed
bedside table: Bedside table
wardrobe: Wardrobe, Cupboard
chest of drawers: Dresser with drawers, Changing table
bookcase: Bookcase, Full bookcase, Shelves, Vertical shelves
desk: Desk, Technical table, Wooden desk, Desk table
couch: Couch, Sofa, Corner sofa, Winchester sofa, Futon couch, Sofa 2 seats, Sofa 3 seats,
 Burlap sofa, Clear sofa, Rattan sofa, Futon
chair: Chair, Oak chair, Osaka chair, Chair with cushion, Plastic chair, Child chair, Cafe chair,
 Folding chair, Teck chair, Children chair, Ryokan chair, Class seat, Relax chair
beach chair: Deck chair, Beach chair, Pool lounge
stool: Stool, Bar stool, Bar chair, Piano bench
high chair: Baby high chair
bench: Bench, Concrete bench, Painted bench, Wood bank
table: Table, Oak table, Round table, Coffee table, Glass table, Black table, Wooden table,
 Cafe table, Folding table, Rattan table, Bar table, Table with tablecloth, Children table,
 Table on trestles, Wooden alder table, Wooden teak table
television: TV, TV 16:9, Wall flat TV
hammock: Hammock
fireplace: Fireplace
aquarium: Aquarium
bathtub: Bath, Island bath, Corner bathtub
toilet: Toilets unit
sink: Washbasin, Sink, Basin
refrigerator: Refrigerator, Fridge, Large fridge
oven: Oven, Small oven, Stove, Large stove, Cooker, Double oven
washing machine: Washing machine, Clothes washing machine, Dryer machine
lamp: Lamp, Little lamp, Desk lamp, Pedestal vase lamp, Chandelier lamp
street lamp: Street lamp, Classic lamppost, Street light, Park light, Outdoor lamp
trash can: Dustbin, Bullet trash can, Park trashcan, Residential trashcan, Recycling bin
doll house: Doll house
rug: Round carpet
coat rack: Clothes rack
filing cabinet: Filing cabinet
safe: Safe
pool table: Pool table
football table: Football table
ping pong table: Table tennis
""",
    "toy": """
teddy bear: Teddy bear
rocking horse: Rocking horse
airplane: Biplane
doll: Doll
toy train: Toy train
toy car: Car model
xylophone: Xylophone
puzzle piece: Puzzle
chessboard: Chessboard
snowman: Snowman
swing: Child swing
seesaw: Seesaw
slide: Children game
dog house: Dog house
sandpit: Sandpit
trampoline: Trampoline
playing cards: Card game
wooden toy: Wood toy
""",
    "animal": """
chicken: Chicken
horse: Horse
dog: Bulldog, Dog
cat: Siamese cat, Cat
rabbit: Rabbit
deer: Deer
""",
    "person": """
man: Male, Holding male, Sitting male, Mannequin male
woman: Female, Holding female, Sitting female, Mannequin female
boy: Boy, Sitting boy
girl: Girl, Sitting girl
""",
    "plant": """
cactus: Cactus
potted plant: Little plant, Plant, Decorative plant, Bamboo, Indoor plant, Spathiphyllum, Yucca,
 Spider plant, Succulent plant, Ficus, Bonsai tree, Scopia/ficus
orchid: Orchids
tulip: Tulips
lily: White lily
bouquet: Flowers
christmas tree: Christmas tree
evergreen tree: Pine, Pine under snow, Blue pine under snow, Cypress
palm tree: Palm tree, Coconut tree, Bended coconut tree
deciduous tree: Acacia, Copper beech, Japanese maple, Poplar, Peach blossom, Sycamore maple
bush: Bush
flower box: Flower box, Plant box
""",
    "food": """
bread: Bread
butter: Butter
cupcake: Cup cake
hot dog: Hot dog
hamburger: Hamburger
birthday cake: Birthday cake
apple: Apples
roast chicken: Roasted chicken
french fries: French fries
steak: Steak
sushi: Sushi tray
salad: Bowl with salad
fruit bowl: Bowl with fruits
milk carton: Milk
""",
    "clothing": """
backpack: Backpack
briefcase: Briefcase
handbag: Handbag
boot: Bootie
slippers: Slippers
high heel shoe: Woman shoes
shoe: Mocassin
dress: Dress
cap: Cap
hat: Hat
helmet: Helmet
shorts: Short
trousers: Trousers
coat: Jacket
skirt: Skirt
socks: Socket
watch: Watch
ring: Ring
gloves: Glove
suit: Suit
glasses: Glasses
sunglasses: Sunglasses
headphones: Headphones
suitcase: Suitcase
umbrella: Umbrella
""",
    "instrument": """
guitar: Electric guitar
grand piano: Grand piano
piano: Upright piano
keyboard: KatorLegaz/MIDI-keyboard
""",
    "vehicle": """
motorcycle: Motorbike
truck: Truck
forklift: Fork lift
bicycle: Bike, Bicycle
scooter: Scooter
kick scooter: Scopia/scooter
tricycle: Tricycle
bus: Bus, City bus
car: SUV, Concept Sedan 01, Concept Sedan 02, Concept Sedan 02 Sport
skateboard: Skateboard
stroller: Stroller
boat: Rowboat
wheelbarrow: Wheelbarrow
wheelchair: Wheelchair
lawn mower: Mower
""",
    "object": """
vase: Vase, Old jar
jar: Pottery
teapot: Teapot
coffee cup: Coffee cup, Cup, Coffee mug
coffee maker: Coffee maker, Coffee machine, Coffee brewer, Coffee press, Espresso kettle
clock: Clock, Cuckoo clock
candle: Candle
lantern: Stone lantern, Japanese lantern, Camping lamp
scissors: Scissors
ruler: Ruler
calendar: Calendar
baby bottle: Baby bottle
comb: Comb
brush: Brush
soap: Soap
sponge: Sponge
towel: Towel, Folded clothes
perfume bottle: Flacon
lipstick: Lip stick
potty: Potty
mailbox: Mailbox, Letters box
fountain: Fountain
tent: Camping tent, Barnum
fire hydrant: Fire hydrant
fire extinguisher: Extinguisher
traffic cone: Cone
barrel: Barrel
crate: Crate
box: Cardboard box, Open cardboard box, Box
gift: Gift
chest: Chest, Trunck
basketball: Basketball
soccer ball: Soccer ball
tennis racket: Tennis racket
ping pong paddle: Table tennis bat
punching bag: Punching ball
fan: Table fan, Rigged fan
speaker: Speaker
radio: Radio, Mini stereo
telephone: Phone, Wireless phone
laptop: Laptop
printer: Inkjet printer and scanner
projector: Video projector
microwave: Microwave
toaster: Toaster
blender: Blender
juicer: Squeezer
kitchen scale: Kitchen scale
knife block: Knife stand
chopping board: Chopping board
pan: Large pan
bowl: Bowl
plate: Plate, Oval plate
fork: Fork
spoon: Spoon
knife: Knife, Kitchen knife
glass: Glass, Plastic cup
beer mug: Beer glass
beer bottle: Beer bottle
wine bottle: Wine bottle
cocktail glass: Cocktail glass
salt: Salt shaker
spray bottle: Spray bottle
basket: Clothes basket, Shopping basket
broom: Broom
shovel: Shovel
hammer: Hammer
saw: Saw
screwdriver: Screwdriver
drill: Drill
ladder: Step ladder, Small step ladder
pen: Text marker, Pencil
stapler: Stapler
book: Book
newspaper: Newspaper
picture frame: Frame Chambord, Frame Hôi An
whiteboard: White board
dartboard: Dart game
pinball machine: Flipper
key: Keys
padlock: Number lock
flashlight: Flashlight
thermometer: Thermometer
ashtray: Ashtray, Hashtray
bottle: Bottle, Medicine bottle, Yogurt bottle
firewood: Wood logs
exercise bike: Indoor bike
treadmill: Treadmill
water cooler: Water cooler
basketball hoop: Basketball net
football goal: Football goal
tape measure: Tape measure
hose: Hose reel
rock: Rock
hut: Child hut, Garden hut
sleeping bag: Sleeping bag
""",
}

# of the names above, models that are not it, carry a brand, render badly, or repeat a held-out one
EXCLUDED_MODELS = {
    "BlendSwap-CC-0/peterbilt",
    "BlendSwap-CC-BY/dafTruck",
    "Scopia/ps4-joystick",
    "BlendSwap-CC-0/iphone",
    "BlendSwap-CC-0/ammoBox",
    "Scopia/basic_camera",
    "BlendSwap-CC-0/numberLock",
    "Scopia/sushi_tray",
    "Scopia/pantalon-shadows",
    "KatorLegaz/oriental-rug",
    "Scopia/box_room",
    "BlendSwap-CC-0/knifeStandSwap",
    "Scopia/dining_room",
    "Scopia/medicoscopia_bottle",
    "Scopia/medicoscopia_bottle2",
    "Scopia/jupe",
    "Scopia/jupe-doeskin",
    "Scopia/robe",
    "Scopia/cendrier",
    "BlendSwap-CC-0/stove",
    "Scopia/kids_desk_table",
    "BlendSwap-CC-BY/thermometer",
    "Scopia/bathroom1",
    "BlendSwap-CC-0/beerGlass",
    "Scopia/montre",
    "KatorLegaz/concept-sedan-01v2",
    "Scopia/short-shadows",
    "Scopia/suv",
    "Scopia/van",
    "Scopia/reflex_camera",
    "BlendSwap-CC-0/kitchenaid",
    "Scopia/sneakers",
    "Scopia/acacia",
    "Scopia/blouson",
}


def _table() -> dict[str, tuple[str, str]]:
    """Catalogue name or LIBRARY/ID -> (noun, category)."""
    table = {}
    for category, text in _NAMES.items():
        for line in text.replace(",\n ", ", ").strip().splitlines():
            noun, names = line.split(": ", 1)
            table |= {name.strip(): (noun, category) for name in names.split(",")}
    return table


MODEL_NOUNS = _table()
