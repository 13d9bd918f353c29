"""What the common-sense rows know: small tables of plain facts, written for this corpus."""

from __future__ import annotations

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Iceland": "Reykjavik", "Belgium": "Brussels",
    "Croatia": "Zagreb", "Romania": "Bucharest", "Bulgaria": "Sofia", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Ghana": "Accra", "Morocco": "Rabat", "Senegal": "Dakar", "Ethiopia": "Addis Ababa", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Nepal": "Kathmandu",
    "South Korea": "Seoul", "Mongolia": "Ulaanbaatar", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Uruguay": "Montevideo",
    "Colombia": "Bogota", "Ecuador": "Quito", "Australia": "Canberra", "New Zealand": "Wellington",
}  # fmt: skip

CONTINENTS = {
    "Europe": ["France", "Germany", "Italy", "Spain", "Portugal", "Austria", "Poland", "Hungary", "Greece", "Norway",
               "Sweden", "Finland", "Denmark", "Ireland", "Belgium", "Croatia", "Romania", "Bulgaria"],
    "Africa": ["Kenya", "Ghana", "Morocco", "Senegal", "Ethiopia", "Nigeria", "Uganda", "Mali"],
    "Asia": ["Japan", "China", "India", "Thailand", "Vietnam", "Nepal", "South Korea", "Mongolia"],
    "North America": ["Canada", "Mexico", "Cuba"],
    "South America": ["Peru", "Chile", "Argentina", "Brazil", "Uruguay", "Colombia", "Ecuador"],
}  # fmt: skip

ANIMALS = {  # kind, legs, food, home, young
    "cow": ("mammal", 4, "grass", "on a farm", "calf"),
    "horse": ("mammal", 4, "grass and hay", "on a farm", "foal"),
    "sheep": ("mammal", 4, "grass", "in a meadow", "lamb"),
    "goat": ("mammal", 4, "leaves and grass", "on a farm", "kid"),
    "pig": ("mammal", 4, "grain and scraps", "on a farm", "piglet"),
    "dog": ("mammal", 4, "meat and dog food", "with people", "puppy"),
    "cat": ("mammal", 4, "mice and cat food", "with people", "kitten"),
    "fox": ("mammal", 4, "mice and rabbits", "in a den", "cub"),
    "bear": ("mammal", 4, "berries and fish", "in the forest", "cub"),
    "wolf": ("mammal", 4, "deer", "in a pack in the forest", "pup"),
    "lion": ("mammal", 4, "zebras and antelopes", "in the savanna", "cub"),
    "deer": ("mammal", 4, "leaves and grass", "in the forest", "fawn"),
    "kangaroo": ("mammal", 2, "grass", "in Australia", "joey"),
    "elephant": ("mammal", 4, "grass and bark", "in the savanna", "calf"),
    "whale": ("mammal", 0, "krill and fish", "in the ocean", "calf"),
    "seal": ("mammal", 0, "fish", "on cold coasts", "pup"),
    "hen": ("bird", 2, "seeds and insects", "in a coop", "chick"),
    "duck": ("bird", 2, "water plants", "at a pond", "duckling"),
    "goose": ("bird", 2, "grass", "near water", "gosling"),
    "swan": ("bird", 2, "water plants", "on a lake", "cygnet"),
    "owl": ("bird", 2, "mice", "in old trees", "owlet"),
    "eagle": ("bird", 2, "small animals", "in the mountains", "eaglet"),
    "frog": ("amphibian", 4, "insects", "at a pond", "tadpole"),
    "butterfly": ("insect", 6, "nectar", "in gardens", "caterpillar"),
    "salmon": ("fish", 0, "small fish", "in rivers and the sea", "fry"),
}

TOOLS = {
    "hammer": "drive a nail into wood", "saw": "cut a plank", "umbrella": "stay dry in the rain", "kettle": "boil water",
    "needle": "sew on a button", "broom": "sweep the floor", "ladder": "reach a high shelf", "torch": "see in the dark",
    "thermometer": "measure a temperature", "compass": "find north", "ruler": "measure a length", "fridge": "keep milk cold",
    "oven": "bake bread", "shovel": "dig a hole", "rake": "gather fallen leaves", "pillow": "rest your head",
    "towel": "dry your hands", "key": "open a locked door", "map": "find the way", "anchor": "hold a ship in place",
    "telescope": "look at distant stars", "microscope": "look at very small things", "scale": "weigh flour",
    "clock": "know the time", "candle": "decorate a birthday cake", "sledge": "slide down a snowy hill",
    "tent": "sleep outdoors", "bucket": "carry water", "rope": "tie up a boat", "calendar": "look up a date",
    "corkscrew": "open a bottle of wine", "sieve": "drain noodles", "helmet": "protect your head", "whistle": "call the players",
    "screwdriver": "fasten a screw", "sponge": "wash the dishes", "mirror": "see your own face", "pen": "write a letter",
    "toothbrush": "clean your teeth", "comb": "tidy your hair", "lawnmower": "cut the grass", "blanket": "keep warm at night",
}  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("early", "late"), ("full", "empty"), ("wet", "dry"), ("loud", "quiet"), ("cheap", "expensive"),
    ("rough", "smooth"), ("deep", "shallow"), ("wide", "narrow"), ("strong", "weak"), ("brave", "cowardly"),
    ("open", "closed"), ("ancient", "modern"), ("generous", "stingy"), ("sharp", "blunt"), ("tame", "wild"),
    ("rare", "common"), ("guilty", "innocent"), ("polite", "rude"), ("simple", "complicated"), ("tight", "loose"),
    ("visible", "hidden"), ("thick", "thin"), ("fresh", "stale"), ("asleep", "awake"), ("public", "private"),
    ("temporary", "permanent"), ("victory", "defeat"), ("arrival", "departure"), ("entrance", "exit"),
    ("friend", "enemy"), ("question", "answer"), ("north", "south"), ("increase", "decrease"), ("accept", "refuse"),
    ("remember", "forget"), ("lend", "borrow"), ("build", "destroy"), ("push", "pull"), ("rise", "fall"),
]  # fmt: skip

WORKERS = {
    "baker": "makes bread and cakes", "plumber": "repairs water pipes", "pilot": "flies aeroplanes", "nurse": "cares for sick people",
    "farmer": "grows crops and keeps animals", "teacher": "helps pupils to learn", "tailor": "sews and alters clothes",
    "judge": "decides cases in court", "carpenter": "builds things from wood", "librarian": "looks after books and lends them",
    "dentist": "treats teeth", "florist": "sells flowers", "firefighter": "puts out fires", "miner": "digs coal or ore from the ground",
    "chef": "cooks in a restaurant", "sculptor": "carves statues", "postman": "delivers letters", "translator": "turns texts into another language",
    "architect": "designs buildings", "beekeeper": "keeps bees for honey", "optician": "fits glasses", "sailor": "works on a ship",
    "mechanic": "repairs engines", "astronomer": "studies the stars", "vet": "treats sick animals", "barber": "cuts hair",
    "potter": "shapes bowls from clay", "journalist": "reports the news", "electrician": "installs electric wires", "shepherd": "looks after sheep",
}  # fmt: skip

MATERIALS = {
    "window": "glass", "tyre": "rubber", "book": "paper", "coin": "metal", "jumper": "wool", "brick": "clay", "candle": "wax",
    "boot": "leather", "bottle": "glass", "nail": "steel", "snowman": "snow", "sail": "cloth", "log cabin": "wood",
    "statue": "stone", "T-shirt": "cotton", "newspaper": "paper", "ring": "gold or silver", "teacup": "porcelain",
    "barrel": "wood", "saucepan": "metal", "balloon": "rubber", "wardrobe": "wood", "raincoat": "waterproof cloth",
}  # fmt: skip

HEAVIER = (
    "feather", "postcard", "pencil", "apple", "melon", "suitcase", "bicycle", "piano", "car", "lorry", "steam engine",
    "cargo ship", "mountain",
)  # fmt: skip

CAUSES = {
    "do leaves turn yellow in autumn": "the green pigment in them breaks down",
    "does ice float on water": "ice is less dense than water",
    "do we see lightning before thunder": "light travels faster than sound",
    "do people sweat": "sweat cools the skin as it dries",
    "do birds fly south in winter": "there is more food in warmer places",
    "does bread rise": "yeast makes bubbles of gas in the dough",
    "is it dark at night": "our side of the Earth faces away from the Sun",
    "does iron rust": "it reacts with oxygen and water",
    "do people wear coats in winter": "coats keep the body warm",
    "do plants need light": "they make their food with it",
    "does milk go sour": "bacteria turn its sugar into acid",
    "do puddles disappear after rain": "the water evaporates or sinks into the ground",
    "do ships have anchors": "anchors keep them from drifting away",
    "do cats have whiskers": "whiskers help them to feel their way",
    "do we wash our hands before eating": "washing removes dirt and germs",
    "do fish have gills": "gills let them breathe under water",
    "do roads get slippery in winter": "ice forms on them",
    "do bees visit flowers": "they collect nectar and pollen",
    "does wood float": "it is lighter than the same amount of water",
    "does a kettle whistle": "steam rushes through a small hole",
    "is sea water salty": "rivers carry salts from rocks into the sea",
    "do people yawn in the evening": "they are tired",
    "does the Moon shine": "it reflects the light of the Sun",
    "do owls hunt at night": "they see and hear very well in the dark",
    "do we put food in the fridge": "cold slows down the growth of germs",
    "do drivers wear seat belts": "belts hold them in an accident",
    "does a balloon shrink in the cold": "cold air takes up less room",
    "do days grow longer in spring": "the Sun stays above the horizon for longer",
}

PLACES = {
    "library": "borrow a book", "bakery": "buy fresh bread", "pharmacy": "buy medicine", "cinema": "watch a film",
    "station": "catch a train", "museum": "see old objects", "bank": "open an account", "swimming pool": "swim", "school": "learn to read",
    "theatre": "see a play", "airport": "board a plane", "harbour": "take a ferry", "post office": "send a parcel", "zoo": "see wild animals",
    "garage": "have a car repaired", "market": "buy vegetables", "gym": "lift weights", "laundry": "have clothes washed",
    "stadium": "watch a football match", "hotel": "spend the night while travelling", "restaurant": "eat a meal cooked by others",
    "forest": "pick mushrooms", "beach": "build a sandcastle", "hairdresser": "get a haircut", "playground": "play on a swing",
}  # fmt: skip

GROUPS = {
    "fruits": ["apple", "pear", "plum", "cherry", "mango", "peach", "grape"],
    "birds": ["owl", "robin", "swan", "eagle", "sparrow", "crow", "stork"],
    "tools": ["hammer", "saw", "drill", "chisel", "wrench", "rake", "shovel"],
    "colours": ["red", "blue", "green", "purple", "yellow", "brown", "grey"],
    "instruments": ["violin", "flute", "trumpet", "piano", "drum", "harp", "guitar"],
    "vehicles": ["bus", "train", "bicycle", "tram", "lorry", "ship", "van"],
    "clothes": ["shirt", "scarf", "coat", "sock", "glove", "skirt", "jumper"],
    "planets": ["Mars", "Venus", "Jupiter", "Saturn", "Neptune", "Mercury", "Uranus"],
    "metals": ["iron", "copper", "silver", "gold", "tin", "zinc", "lead"],
    "trees": ["oak", "birch", "maple", "pine", "willow", "beech", "ash"],
}

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
