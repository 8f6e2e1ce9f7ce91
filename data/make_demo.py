"""Write demo.jsonl, the demo training data, next to this file.

Every record asks for one change to a short English sentence, such as active to passive.
The sentences come from the word tables below, and the fixed seed makes every run write the same bytes.
"""

import json
import random
import re
from collections import Counter, namedtuple
from pathlib import Path

# base past participle: objects that suit the verb; ...
IRREGULAR_VERBS = """
break broke broken: window plate cup bottle chair clock toy; bring brought brought: letter chair box cake basket gift
ticket; build built built: house bridge tower wall fence boat table; buy bought bought: car house ticket horse jacket
hat ring; catch caught caught: ball bird rabbit horse dog cat thief; choose chose chosen: gift jacket hat song book
picture car; cut cut cut: cake pie pizza apple tomato carrot rose; draw drew drawn: picture map house tree horse boat
bridge; drive drove driven: car truck bus van taxi boat; eat ate eaten: meal cake pie sandwich apple potato cookie;
feed fed fed: dog cat horse cow bird rabbit child; find found found: key ring coin letter hat cat bag; forget forgot
forgotten: key bag ticket coat hat book; grow grew grown: flower tree rose apple potato tomato carrot; hang hung hung:
coat shirt jacket picture clock map; hear heard heard: song tune melody story speech bird dog; hide hid hidden: key
letter ring coin gift map knife; hold held held: cup bag box ball book cat ticket; lose lost lost: key ring coin ticket
bag hat ball; make made made: cake pie pizza sandwich jacket toy basket; meet met met: doctor lawyer tourist king queen
pilot artist; pay paid paid: waiter driver gardener mechanic worker baker; read read read: book letter story poem
report message map; see saw seen: picture film tower horse king singer; sell sold sold: car house boat cow book jacket
ring; send sent sent: letter message report gift ticket box; shake shook shaken: bottle box blanket bag basket tree;
sing sang sung: song tune melody hymn carol ballad; steal stole stolen: car bicycle ring coin picture bag horse; take
took taken: book key bag ticket coin cup gift; teach taught taught: student child boy girl dancer soldier; tear tore
torn: shirt jacket letter coat ticket book; throw threw thrown: ball hat coin bottle toy bag; wake woke woken: child
boy king student soldier sister dog; wear wore worn: shirt jacket coat hat ring scarf; write wrote written: letter book
story poem report speech
"""
# base past: objects that suit the verb; ... (the participle is the same as the past)
REGULAR_VERBS = """
bake baked: cake pie pizza cookie potato apple; carry carried: box basket bag table chair bottle child; chase chased:
dog cat rabbit horse cow thief; clean cleaned: room floor window table house car knife; close closed: door window gate
box book bag; cook cooked: meal egg potato carrot pizza tomato; copy copied: letter report map picture poem message
song; drop dropped: ball cup plate bottle key coin egg; dry dried: plate cup dish shirt jacket coat knife; finish
finished: report book story poem meal speech game lesson; fix fixed: car truck bicycle clock door fence toy; follow
followed: guard teacher thief writer clerk bus taxi; help helped: farmer mother sailor nurse child writer neighbor; hug
hugged: child mother father brother aunt cousin dog; invite invited: singer dancer musician scientist cousin prince
plumber; open opened: door window gate box letter bag bottle; paint painted: wall door fence house room boat chair; plan
planned: trip party meal lesson garden speech; plant planted: tree flower rose potato tomato carrot; polish polished:
table car ring coin plate clock; pull pulled: door box table car boat basket; sign signed: letter report book ticket
picture message; stop stopped: car bus truck taxi game thief driver; study studied: map report picture lesson poem bird;
thank thanked: doctor nurse waiter chef engineer judge librarian; visit visited: aunt uncle sister garden bridge tower;
wash washed: car plate cup dish window shirt apple; watch watched: film game bird horse dancer child boat; water
watered: flower tree rose garden tomato carrot; wrap wrapped: gift box sandwich bottle cup ring
"""
PEOPLE = """
actor artist aunt baker plumber boy brother chef child cousin dancer doctor driver engineer farmer father hunter
gardener girl guard judge king lady lawyer librarian clerk manager mechanic mother musician neighbor nurse pilot prince
painter queen sailor scientist secretary singer sister soldier student teacher thief tourist uncle waiter writer worker
""".split()
PLURALS = {"child": "children", "knife": "knives", "potato": "potatoes", "scarf": "scarves", "thief": "thieves",
           "tomato": "tomatoes"}

# Tail phrases and the verbs that they suit, or do not: nobody sells the house every day.
TAILS = [
    (["every day", "every week"], "not: break build buy choose find finish grow lose paint plan sell sign steal tear"),
    (["in the morning", "in the afternoon", "in the evening", "on Monday", "on Friday", "before lunch", "after dinner"],
     "not: build grow"),
    (["in the spring", "in the summer"], "not:"),
    (["at home"], "bake cook draw dry eat hang hear help make meet read sing study teach wash watch write"),
    (["with great care"], "build carry clean cook copy cut draw drive fix hang make open paint plan polish wash write"),
]

Verb = namedtuple("Verb", "base past participle objects")
Noun = namedtuple("Noun", "word plural")
Sentence = namedtuple("Sentence", "subject verb object past tail")
ROWS = [entry.split(":") for entry in (IRREGULAR_VERBS + ";" + REGULAR_VERBS).split(";")]
VERBS = [Verb(*forms.split()[:2], forms.split()[-1], objects.split()) for forms, objects in ROWS]
NOUNS = set(PEOPLE).union(*(verb.objects for verb in VERBS))


def add_s(word):
    """Plural of a noun, or third person singular of a verb."""
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return PLURALS.get(word) or word + ("es" if re.search("(s|x|ch|sh)$", word) else "s")


def the(noun):
    return "the " + (add_s(noun.word) if noun.plural else noun.word)


def join(*words, end="."):
    text = " ".join(word for word in words if word) + end
    return text[0].upper() + text[1:]


def active(s):
    finite = s.verb.past if s.past else s.verb.base if s.subject.plural else add_s(s.verb.base)
    return join(the(s.subject), finite, the(s.object), s.tail)


def passive(s):
    be = (("is", "are"), ("was", "were"))[s.past][s.object.plural]
    return join(the(s.object), be, s.verb.participle, "by", the(s.subject), s.tail)


def do(s):
    return "did" if s.past else "do" if s.subject.plural else "does"


def question(s):
    return join(do(s), the(s.subject), s.verb.base, the(s.object), s.tail, end="?")


def negative(s):
    return join(the(s.subject), do(s), "not", s.verb.base, the(s.object), s.tail)


# family: records per verb, answer, wordings (the first is the usual one)
FAMILIES = {
    "passive": (40, passive, ["Convert the active sentence to passive: '%s'", "Rewrite in the passive voice: '%s'",
                              "Make this sentence passive: '%s'"]),
    "question": (4, question, ["Turn the sentence into a question: '%s'"]),
    "negative": (4, negative, ["Make the sentence negative: '%s'"]),
    "past": (4, lambda s: active(s._replace(past=True)), ["Change the sentence to the past tense: '%s'"]),
    "swap": (4, lambda s: active(s._replace(subject=s.object, object=s.subject)),
             ["Swap the subject and the object: '%s'"]),
    "capitals": (4, lambda s: active(s).upper(), ["Write the sentence in capital letters: '%s'"]),
}


def invent(rng, verb, past, objects):
    thing = Noun(rng.choice(objects), rng.random() < 0.5)
    # Without an -s, "read" and "cut" do not show their tense; in the present, subjects are singular throughout.
    plural = past and verb.base != verb.past and rng.random() < 0.4
    subject = Noun(rng.choice([word for word in PEOPLE if word != thing.word]), plural)
    tails = [t for group, verbs in TAILS for t in group if (verb.base in verbs.split()) != verbs.startswith("not:")]
    return Sentence(subject, verb, thing, past, rng.choice(tails) if rng.random() < 0.6 else "")


def main():
    rng, records, taken, counts = random.Random(20), [], set(), Counter()
    cook = next(verb for verb in VERBS if verb.base == "cook")
    canonical = Sentence(Noun("chef", False), cook, Noun("meal", False), False, "every day")
    for family, (per_verb, answer, wordings) in FAMILIES.items():
        nouns = set(PEOPLE) if family == "swap" else NOUNS
        verbs = [verb for verb in VERBS if nouns & set(verb.objects)]
        while counts[family] < per_verb * len(VERBS):
            # The verbs take turns, in both tenses, so that every participle is seen often enough to be learnt.
            turn, place = divmod(counts[family], len(verbs))
            verb = verbs[place]
            s = invent(rng, verb, family != "past" and turn % 2 == 1, [word for word in verb.objects if word in nouns])
            wording = rng.choices(wordings, [6, 1, 1][:len(wordings)])[0]
            if (family, verb, turn) == ("passive", cook, 0):
                s, wording = canonical, wordings[0]
            record = {"instruction": wording % active(s), "output": answer(s)}
            keys = {*record.values(), (family, s.subject.word, verb.base, s.object.word)}
            if keys.isdisjoint(taken):
                records.append(record)
                taken |= keys
                counts[family] += 1
    rng.shuffle(records)
    instructions, outputs = ([record[key] for record in records] for key in ("instruction", "output"))
    assert len(set(instructions)) == len(set(outputs)) == len(records)
    assert instructions.count(FAMILIES["passive"][2][0] % active(canonical)) == 1
    path = Path(__file__).with_name("demo.jsonl")
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode("ascii"))
    print(f"{dict(counts)}, {len(records)} records, {path.stat().st_size} bytes")
    print(f"{len(VERBS)} verbs, {IRREGULAR_VERBS.count(':')} irregular; {len(NOUNS)} nouns")
    for name, texts in ("instruction", instructions), ("output", outputs):
        print(f"{name}: {sum(map(len, texts)) / len(texts):.1f} characters on average, at most {max(map(len, texts))}")


if __name__ == "__main__":
    main()
