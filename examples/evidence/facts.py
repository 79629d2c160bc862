"""Facts and prompts that no package holds: what the study asks besides geography, and nobody trains on."""

from __future__ import annotations

from itertools import pairwise

SYMBOLS = """
hydrogen H, helium He, lithium Li, beryllium Be, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne, sodium Na,
magnesium Mg, aluminum Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K, calcium Ca,
titanium Ti, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, arsenic As, bromine Br,
krypton Kr, silver Ag, tin Sn, iodine I, xenon Xe, barium Ba, tungsten W, platinum Pt, gold Au, mercury Hg, lead Pb,
radon Rn, radium Ra, uranium U, plutonium Pu, cadmium Cd, antimony Sb, boron B, cesium Cs, gallium Ga, bismuth Bi
"""

OPPOSITES = """
hot cold, big small, up down, fast slow, light dark, old new, young old, rich poor, happy sad, strong weak, wet dry,
hard soft, open closed, full empty, early late, high low, good bad, day night, left right, near far, loud quiet,
clean dirty, thick thin, deep shallow, heavy light, long short, wide narrow, true false, love hate, war peace,
win lose, buy sell, push pull, start end, first last, inside outside, north south, east west, black white, male female,
success failure, accept reject, increase decrease, arrive depart, ancient modern, brave cowardly, sharp dull,
cheap expensive, smooth rough, alive dead
"""

PASTS = """
go went, see saw, eat ate, take took, give gave, come came, write wrote, speak spoke, break broke, drive drove,
begin began, drink drank, sing sang, swim swam, run ran, fly flew, know knew, grow grew, throw threw, draw drew,
buy bought, think thought, teach taught, catch caught, find found, sleep slept, feel felt, keep kept, leave left,
tell told, sell sold, hear heard, make made, lose lost, win won, stand stood, understand understood, choose chose,
forget forgot, steal stole
"""

PLURALS = """
child children, man men, woman women, foot feet, tooth teeth, mouse mice, goose geese, person people, knife knives,
leaf leaves, wolf wolves, city cities, baby babies, box boxes, church churches, hero heroes, potato potatoes,
cactus cacti, sheep sheep, fish fish, ox oxen, life lives, half halves, country countries, bus buses
"""

YOUNG = """
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, lion cub, bear cub, deer fawn, duck duckling,
frog tadpole, hen chick, kangaroo joey, goose gosling, swan cygnet
"""

AUTHORS = """
Hamlet: William Shakespeare; Romeo and Juliet: William Shakespeare; Pride and Prejudice: Jane Austen; 1984: George
Orwell; Animal Farm: George Orwell; The Hobbit: J.R.R. Tolkien; Moby-Dick: Herman Melville; The Great Gatsby: F. Scott
Fitzgerald; Great Expectations: Charles Dickens; A Christmas Carol: Charles Dickens; Oliver Twist: Charles Dickens;
Frankenstein: Mary Shelley; Dracula: Bram Stoker; War and Peace: Leo Tolstoy; Anna Karenina: Leo Tolstoy; Crime and
Punishment: Fyodor Dostoevsky; The Odyssey: Homer; The Iliad: Homer; The Divine Comedy: Dante Alighieri; Don Quixote:
Miguel de Cervantes; Les Misérables: Victor Hugo; The Old Man and the Sea: Ernest Hemingway; To Kill a Mockingbird:
Harper Lee; The Catcher in the Rye: J.D. Salinger; Brave New World: Aldous Huxley; Jane Eyre: Charlotte Brontë;
Wuthering Heights: Emily Brontë; The Time Machine: H.G. Wells; The Metamorphosis: Franz Kafka; The Republic: Plato;
On the Origin of Species: Charles Darwin; The Wealth of Nations: Adam Smith; Alice's Adventures in Wonderland: Lewis
Carroll; Treasure Island: Robert Louis Stevenson; The Lord of the Rings: J.R.R. Tolkien
"""

SEQUENCES = {
    "month": "January February March April May June July August September October November December",
    "day of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "letter": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "number": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
}

OPEN_PROMPTS = """
Give me three tips for staying healthy.
Explain why the sky is blue in simple words.
Write a short poem about the sea.
What are the benefits of reading books?
Describe a typical day of a farmer.
How do plants make food?
Write a polite email asking for a day off.
What should I pack for a trip to the mountains?
Tell me a short story about a brave dog.
How does a bicycle stay upright?
Give me a simple recipe for pancakes.
Why is sleep important?
What is the difference between weather and climate?
List some ways to save money.
How can I learn a new language quickly?
Explain what gravity is to a child.
What are some good habits for students?
Describe the life cycle of a butterfly.
Write a thank you note to a teacher.
What makes a good friend?
How do airplanes fly?
Suggest three names for a coffee shop and say why.
What is democracy?
Summarize the story of Cinderella in a few sentences.
How do I prepare for a job interview?
What are the main causes of pollution?
Explain how a computer stores information.
Give advice to someone who feels nervous before a speech.
What is photosynthesis?
Write a short dialogue between a cat and a mouse.
How do vaccines work?
What are the advantages of public transport?
Describe your favorite season.
Explain the water cycle.
How can I make new friends in a new city?
What is machine learning?
Write two sentences about the moon.
Why do we have leap years?
How should I take care of a houseplant?
What is the purpose of a budget?
"""


def _pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(entry.split()) for entry in " ".join(table.split()).split(", ")]  # type: ignore[misc]


def other_questions() -> list[tuple[str, str, str]]:
    """(question, beginning of the answer, what completes it) of everything that is not geography."""
    rows: list[tuple[str, str, str]] = []
    for name, symbol in _pairs(SYMBOLS):
        rows.append((f"What is the chemical symbol of {name}?", f"The chemical symbol of {name} is", symbol))
    for word, opposite in _pairs(OPPOSITES):
        rows.append((f'What is the opposite of "{word}"?', f'The opposite of "{word}" is "', opposite))
    for verb, past in _pairs(PASTS):
        rows.append((f'What is the past tense of "{verb}"?', f'The past tense of "{verb}" is "', past))
    for word, plural in _pairs(PLURALS):
        rows.append((f'What is the plural of "{word}"?', f'The plural of "{word}" is "', plural))
    for animal, young in _pairs(YOUNG):
        rows.append((f"What is a baby {animal} called?", f"A baby {animal} is called a", young))
    for entry in " ".join(AUTHORS.split()).split("; "):
        title, author = entry.split(": ")
        rows.append((f"Who wrote {title}?", f"{title} was written by", author))
    for kind, words in SEQUENCES.items():
        names = words.split()
        for first, second in pairwise(names):
            rows.append((f"Which {kind} comes after {first}?", f"The {kind} after {first} is", second))
    return rows


def open_prompts() -> list[str]:
    """Everyday requests without one right answer."""
    return OPEN_PROMPTS.strip().splitlines()
