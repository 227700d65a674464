"""Second opinions: lorakit beside PEFT, and both beside plain algebra in float64."""
