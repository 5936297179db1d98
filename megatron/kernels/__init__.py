"""Operations with a reference beside each fast form."""
