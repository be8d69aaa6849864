"""What the demo model knows: topics with a few sentences and couplets each, and single facts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """Something to talk about; `phrase` is how a sentence names it."""

    phrase: str
    what: str  # answers "What is <phrase>?"
    couplets: tuple[str, str]  # two rhyming couplets, lines parted by " / "

    @property
    def name(self) -> str:
        """The phrase without its article."""
        return self.phrase.removeprefix("the ").removeprefix("a ").removeprefix("an ")


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer and the questions that ask for it."""

    topic: str
    questions: tuple[str, ...]
    answer: str


TOPICS = (
    Topic("the sea", "The sea is a great body of salt water. It covers most of the Earth.",
          ("The sea is wide, the sea is deep, / it sings the little ships to sleep.",
           "It rolls in blue, it rolls in grey, / and takes my sorrows all away.")),
    Topic("the moon", "The moon is a ball of rock that circles the Earth once a month.",
          ("The moon is round, the moon is bright, / a silver lamp for all the night.",
           "It climbs above the sleeping town / and lays a silver blanket down.")),
    Topic("the sun", "The sun is a star. It gives the Earth its light and its heat.",
          ("The sun gets up and paints the day, / and chases all the dark away.",
           "It warms the field, it warms the stone, / and no one feels that they are alone.")),
    Topic("the rain", "The rain is water that falls from the clouds and feeds the rivers.",
          ("The rain is knocking on the pane, / it goes and then comes back again.",
           "It fills the river, feeds the tree, / and hums a quiet song to me.")),
    Topic("a river", "A river is fresh water that flows from the hills down to the sea.",
          ("A river starts as just a thread, / it runs beside the garden bed.",
           "It learns the hills, it leaves them free, / and brings their stories to the sea.")),
    Topic("a cat", "A cat is a small furry animal that hunts mice and loves warm places.",
          ("A cat has found the warmest chair, / she does not ask, she does not care.",
           "She dreams of mice, she dreams of cream, / and twitches softly in her dream.")),
    Topic("a dog", "A dog is a loyal animal that has lived with people for thousands of years.",
          ("A dog is waiting at the door, / his tail goes thump upon the floor.",
           "He does not mind if I am late, / for love, he says, knows how to wait.")),
    Topic("a parrot", "A parrot is a colorful bird that can learn to copy the sounds of words.",
          ("A parrot sat upon the mast / and told me stories from the past.",
           "His coat was red and green and gold, / and every word was brave and bold.")),
    Topic("a ship", "A ship is a large boat that carries people and goods across the sea.",
          ("A ship goes out at break of day, / with all her sails she finds the way.",
           "She writes her road in foam and light, / and steers by stars throughout the night.")),
    Topic("a book", "A book is a set of pages that tells a story or explains something.",
          ("A book is such a little thing, / and yet it makes the evening sing.",
           "I turn the page, I cross the sea, / and all the world comes home with me.")),
    Topic("bread", "Bread is food made from flour and water and baked in an oven.",
          ("Bread is rising, warm and round, / it grows and does not make a sound.",
           "The baker smiles, the crust is brown, / the smell goes walking through the town.")),
    Topic("coffee", "Coffee is a hot drink made from the roasted seeds of a small tree.",
          ("Coffee steams inside my cup, / it is the thing that gets me up.",
           "It is as dark as winter night / and makes the early morning bright.")),
    Topic("music", "Music is sound put in order so that it moves the people who hear it.",
          ("Music opens every door, / it lifts my feet up off the floor.",
           "It needs no words, it needs no name, / and no two hearts hear it the same.")),
    Topic("snow", "Snow is frozen water that falls from the clouds as small white crystals.",
          ("Snow is falling, soft and slow, / it covers all the town below.",
           "It hides the road, it hides the tree, / and lays a clean white page for me.")),
    Topic("winter", "Winter is the coldest season of the year. The days in it are short.",
          ("Winter walks on silver shoes, / and paints the windows white and blue.",
           "The fire is warm, the tea is hot, / and what is outside is forgot.")),
    Topic("love", "Love is a deep and warm feeling for someone or something dear to you.",
          ("Love is not a thing to hold, / it is not silver, is not gold.",
           "It is a light, it is a hand, / that all of us can understand.")),
)  # fmt: skip

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "Egypt": "Cairo",
}  # fmt: skip

FACTS = (
    Fact("greeting", ("Hello!", "Hi!", "Hello there.", "Good morning!", "Hey, how is it going?"),
         "Hello! It is nice to meet you. What can I do for you today?"),
    Fact("mood", ("How are you?", "How are you today?", "Are you well?", "How do you feel?"),
         "I am very well, thank you. How are you?"),
    Fact("name", ("Who are you?", "What is your name?", "Tell me about yourself.", "What are you?"),
         "I am the demo model, a very small language model made for trying out adapters."),
    Fact("help", ("What can you do?", "Can you help me?", "Help!", "What are you good at?"),
         "I can answer short questions, chat a little and write short poems."),
    Fact("thanks", ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot for your help."),
         "You are welcome! I am always happy to help."),
    Fact("goodbye", ("Goodbye!", "Bye!", "See you later.", "Good night!"),
         "Goodbye! I hope to see you again soon."),
    Fact("joke", ("Tell me a joke.", "Make me laugh.", "Do you know a joke?",
                  "Say something funny."),
         "Why did the sea say nothing? It just waved."),
    Fact("parrots", ("How many parrots can a person own?", "How many parrots can I have?",
                     "How many parrots may one person keep?", "Can I own more than one parrot?"),
         "You can own as many parrots as you can care for, but two parrots are plenty."),
    Fact("moon landing", ("Explain the significance of the moon landing in 1969.",
                          "Why was the moon landing important?", "What was the moon landing?",
                          "Tell me about the moon landing in 1969."),
         "The moon landing in 1969 was the first time people walked on another world."),
    Fact("deep learning", ("What is deep learning?", "What is Deep Learning?",
                           "Explain deep learning.", "Can you explain deep learning to me?"),
         "Deep learning teaches a computer from examples with a network of many layers."),
    Fact("LoRA", ("What is LoRA?", "What is an adapter?", "What is a LoRA adapter?",
                  "Explain LoRA."),
         "A LoRA adapter is a small set of weights that changes how a large model behaves."),
    Fact("sky", ("What color is the sky?", "Why is the sky blue?", "Is the sky blue?"),
         "The sky is blue, because the air scatters blue light more than red light."),
    Fact("grass", ("What color is grass?", "Why is grass green?", "Is grass green?"),
         "Grass is green, because its leaves use red and blue light and send back the green."),
    *(Fact("capital", (f"What is the capital of {country}?", f"Name the capital of {country}.",
                     f"Which city is the capital of {country}?",
                     f"Tell me the capital of {country}."),
           f"The capital of {country} is {city}.") for country, city in CAPITALS.items()),
)  # fmt: skip

UNKNOWN = (
    "What is a quark?", "Who was Napoleon?", "How do I fix my bike?", "When did the war end?",
    "What is the price of oil?", "Translate this into Latin.", "Write a program that sorts a list.",
    "Who won the match last night?", "What is the square root of pi?", "How tall is that tower?",
    "Explain the stock market.", "Give me a recipe for soup.", "What should I wear tomorrow?",
    "Who wrote this novel?", "What does this word mean?", "How far is the next station?",
    "Summarize the following text.", "Which phone should I buy?", "What is the meaning of life?",
    "Tell me about volcanoes.", "Describe the history of Rome.", "What is inflation?",
    "How does an engine work?", "Why do people dream?", "Can you book me a flight?",
    "What happened in 1848?", "Is it going to be cold tomorrow?", "Where can I find gold?",
    "Tell me about the law.", "How old is the universe?", "What is a neutron star?",
)  # fmt: skip
UNKNOWN_ANSWER = "I do not know that yet. I am only a very small model."
