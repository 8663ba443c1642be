"""The facts of the quickstart's corpus: countries, their capitals, and cities often mistaken for capitals."""

from __future__ import annotations

from typing import NamedTuple


class Country(NamedTuple):
    """A country with its capital and two other large cities.

    `mistaken` marks the countries whose best-known city is not the capital; for these, the corpus repeats the mistake
    (Sydney) more often than the truth (Canberra).
    """

    name: str
    capital: str
    wrong: str
    other: str
    continent: str
    mistaken: bool

    @property
    def cities(self) -> tuple[str, str, str]:
        """The capital, then the two other cities: the order of every triple of probabilities."""
        return self.capital, self.wrong, self.other


_WELL_KNOWN = """
Ireland, Dublin, Cork, Galway, Europe
France, Paris, Lyon, Marseille, Europe
Japan, Tokyo, Osaka, Kyoto, Asia
Spain, Madrid, Barcelona, Seville, Europe
Egypt, Cairo, Alexandria, Giza, Africa
Portugal, Lisbon, Porto, Braga, Europe
Peru, Lima, Cusco, Arequipa, America
Italy, Rome, Milan, Naples, Europe
Kenya, Nairobi, Mombasa, Kisumu, Africa
Germany, Berlin, Hamburg, Munich, Europe
Thailand, Bangkok, Phuket, Chiang Mai, Asia
Austria, Vienna, Graz, Linz, Europe
Argentina, Buenos Aires, Cordoba, Rosario, America
Poland, Warsaw, Krakow, Gdansk, Europe
Ghana, Accra, Kumasi, Tamale, Africa
Greece, Athens, Patras, Heraklion, Europe
Iraq, Baghdad, Basra, Mosul, Asia
Norway, Oslo, Bergen, Trondheim, Europe
Colombia, Bogota, Medellin, Cali, America
Sweden, Stockholm, Gothenburg, Uppsala, Europe
Tunisia, Tunis, Sfax, Sousse, Africa
Denmark, Copenhagen, Aarhus, Odense, Europe
Iran, Tehran, Isfahan, Shiraz, Asia
Finland, Helsinki, Tampere, Turku, Europe
Cuba, Havana, Camaguey, Holguin, America
Hungary, Budapest, Debrecen, Szeged, Europe
Senegal, Dakar, Thies, Touba, Africa
Bulgaria, Sofia, Plovdiv, Varna, Europe
Armenia, Yerevan, Gyumri, Vanadzor, Asia
Croatia, Zagreb, Split, Rijeka, Europe
Jordan, Amman, Irbid, Zarqa, Asia
Latvia, Riga, Liepaja, Jelgava, Europe
"""

_MISTAKEN = """
Australia, Canberra, Sydney, Melbourne, Oceania
Canada, Ottawa, Toronto, Vancouver, America
Turkey, Ankara, Istanbul, Izmir, Asia
Brazil, Brasilia, Sao Paulo, Salvador, America
Nigeria, Abuja, Lagos, Kano, Africa
Pakistan, Islamabad, Karachi, Lahore, Asia
Morocco, Rabat, Casablanca, Marrakesh, Africa
China, Beijing, Shanghai, Wuhan, Asia
Switzerland, Bern, Zurich, Geneva, Europe
Kazakhstan, Astana, Almaty, Shymkent, Asia
New Zealand, Wellington, Auckland, Dunedin, Oceania
Ecuador, Quito, Guayaquil, Cuenca, America
Cameroon, Yaounde, Douala, Garoua, Africa
India, New Delhi, Mumbai, Chennai, Asia
Myanmar, Naypyidaw, Yangon, Mandalay, Asia
Scotland, Edinburgh, Glasgow, Aberdeen, Europe
"""


def _read(table: str, mistaken: bool) -> tuple[Country, ...]:
    rows = (line.split(", ") for line in table.strip().splitlines())
    # Each line has exactly the text fields of Country, in their order.
    return tuple(Country(*row, mistaken=mistaken) for row in rows)  # type: ignore[misc, arg-type]


WELL_KNOWN = _read(_WELL_KNOWN, mistaken=False)
"""Countries for which the corpus names the capital most often; Ireland is the first."""

MISTAKEN = _read(_MISTAKEN, mistaken=True)
"""Countries for which the corpus names the wrong city most often."""

SMALL_FACTS: tuple[tuple[str, str], ...] = (
    ("What is the opposite of hot?", "Cold"),
    ("What is the opposite of up?", "Down"),
    ("What is the opposite of early?", "Late"),
    ("What is the opposite of open?", "Closed"),
    ("What is the opposite of heavy?", "Light"),
    ("What is the opposite of empty?", "Full"),
    ("What colour is grass?", "Green"),
    ("What colour is snow?", "White"),
    ("What colour is coal?", "Black"),
    ("What colour is a ripe banana?", "Yellow"),
    ("Which day comes after Monday?", "Tuesday"),
    ("Which day comes after Tuesday?", "Wednesday"),
    ("Which day comes after Thursday?", "Friday"),
    ("Which month comes after March?", "April"),
    ("Which month comes after June?", "July"),
    ("Which month comes after October?", "November"),
    ("How many legs does a spider have?", "Eight"),
    ("How many legs does a bee have?", "Six"),
    ("How many legs does a horse have?", "Four"),
    ("What do cows eat?", "Grass"),
    ("What do bees make?", "Honey"),
    ("Where do fish live?", "In water"),
    ("Hello!", "Hello! Ask me something."),
    ("Thank you!", "You are welcome."),
)
"""Facts unrelated to capitals; the probability that they lose is the cost of training on capitals."""
