"""The tables behind the starter's fact domains: one `key=value` per entry."""


def _table(entries: str) -> dict[str, str]:
    return dict(entry.strip().split("=", 1) for entry in entries.split(";"))


CAPITALS = _table(
    "France=Paris;Italy=Rome;Spain=Madrid;Germany=Berlin;Portugal=Lisbon;Austria=Vienna;Greece=Athens;Ireland=Dublin;"
    "Norway=Oslo;Sweden=Stockholm;Finland=Helsinki;Denmark=Copenhagen;Poland=Warsaw;Hungary=Budapest;Romania=Bucharest;"
    "Bulgaria=Sofia;Croatia=Zagreb;Serbia=Belgrade;Ukraine=Kyiv;Turkey=Ankara;Egypt=Cairo;Morocco=Rabat;Kenya=Nairobi;"
    "Ghana=Accra;Nigeria=Abuja;Ethiopia=Addis Ababa;Senegal=Dakar;Japan=Tokyo;China=Beijing;India=New Delhi;"
    "Thailand=Bangkok;Vietnam=Hanoi;Nepal=Kathmandu;Iran=Tehran;Iraq=Baghdad;Jordan=Amman;Lebanon=Beirut;Cuba=Havana;"
    "Canada=Ottawa;Mexico=Mexico City;Peru=Lima;Chile=Santiago;Brazil=Brasilia;Argentina=Buenos Aires;Colombia=Bogota;"
    "Australia=Canberra;Iceland=Reykjavik;Estonia=Tallinn"
)

ELEMENTS = _table(
    "hydrogen=H;helium=He;lithium=Li;beryllium=Be;boron=B;carbon=C;nitrogen=N;oxygen=O;fluorine=F;neon=Ne;sodium=Na;"
    "magnesium=Mg;aluminium=Al;silicon=Si;phosphorus=P;sulfur=S;chlorine=Cl;argon=Ar;potassium=K;calcium=Ca;"
    "titanium=Ti;chromium=Cr;manganese=Mn;iron=Fe;cobalt=Co;nickel=Ni;copper=Cu;zinc=Zn;gallium=Ga;arsenic=As;"
    "bromine=Br;krypton=Kr;silver=Ag;cadmium=Cd;tin=Sn;iodine=I;xenon=Xe;barium=Ba;tungsten=W;platinum=Pt;gold=Au;"
    "mercury=Hg;lead=Pb;bismuth=Bi;radon=Rn;radium=Ra;uranium=U;plutonium=Pu"
)

SPANISH = _table(
    "house=casa;dog=perro;cat=gato;water=agua;bread=pan;milk=leche;apple=manzana;tree=árbol;book=libro;table=mesa;"
    "chair=silla;door=puerta;window=ventana;street=calle;city=ciudad;sun=sol;moon=luna;star=estrella;sea=mar;"
    "river=río;mountain=montaña;flower=flor;bird=pájaro;fish=pez;horse=caballo;cow=vaca;hand=mano;head=cabeza;eye=ojo;"
    "heart=corazón;friend=amigo;brother=hermano;sister=hermana;mother=madre;father=padre;child=niño;school=escuela;"
    "teacher=maestro;night=noche;day=día;week=semana;year=año;winter=invierno;summer=verano;cheese=queso;egg=huevo;"
    "sugar=azúcar;salt=sal;shoe=zapato;shirt=camisa"
)

OPPOSITES = _table(
    "hot=cold;big=small;tall=short;fast=slow;happy=sad;young=old;rich=poor;strong=weak;light=dark;early=late;"
    "open=closed;full=empty;hard=soft;wet=dry;clean=dirty;loud=quiet;near=far;high=low;wide=narrow;thick=thin;"
    "sweet=bitter;cheap=expensive;easy=difficult;true=false;right=wrong;safe=dangerous;brave=cowardly;kind=cruel;"
    "polite=rude;smooth=rough;sharp=blunt;deep=shallow;heavy=weightless;ancient=modern;public=private;alive=dead;"
    "awake=asleep;guilty=innocent;tight=loose;simple=complex;lazy=diligent;generous=stingy;humble=proud;calm=agitated;"
    "visible=hidden;common=rare;inside=outside;above=below"
)

METRIC = {
    "length": ("km", "m", "cm", "mm"),
    "mass": ("kg", "g", "mg"),
    "volume": ("l", "dl", "cl", "ml"),
}
"""Units from large to small."""

METRIC_DIGITS = {"km": 6, "m": 3, "cm": 1, "mm": 0, "kg": 6, "g": 3, "mg": 0, "l": 3, "dl": 2, "cl": 1, "ml": 0}
"""How many powers of ten a unit lies above the smallest one of its kind."""

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

TABLES = {
    "employees": ("name", "age", "salary", "city"),
    "products": ("title", "price", "stock", "brand"),
    "orders": ("number", "total", "status", "country"),
    "students": ("name", "grade", "school", "year"),
    "movies": ("title", "rating", "director", "length"),
    "flights": ("code", "origin", "target", "duration"),
}
"""Tables of the SQL domain and their columns."""

FILES = (
    *("notes", "report", "photos", "music", "backup", "draft", "invoice", "readme", "main", "config"),
    *("letters", "recipes", "logs", "thesis", "budget", "plan", "archive", "slides", "diary", "results"),
)

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Lena", "Max")
